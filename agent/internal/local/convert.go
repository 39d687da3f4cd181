// Between the wire and the words of package policy.

package local

import (
	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/sdk/svid"

	"google.golang.org/protobuf/types/known/timestamppb"
)

func inputOf(req *agentpb.AuthorizeRequest, destination string) *policy.Input {
	in := &policy.Input{
		Source: req.GetSource(), Destination: destination,
		Protocol: policy.Protocol(req.GetProtocol()), Method: req.GetMethod(),
		Path: req.GetPath(), Query: req.GetQuery(), Host: req.GetHost(),
		SourceAddress: req.GetSourceAddress(), DestinationAddress: req.GetDestinationAddress(),
		SourceSerial: req.GetSourceSerial(),
	}
	if n := len(req.GetHeaders()); n > 0 {
		headers := make(policy.HeaderMap, n)
		for name, values := range req.GetHeaders() {
			headers[name] = values.GetValues()
		}
		in.Headers = headers
	}
	return in
}

func inputToPB(in *policy.Input) *agentpb.AuthorizeRequest {
	req := &agentpb.AuthorizeRequest{
		Destination: in.Destination, Source: in.Source, Protocol: string(in.Protocol),
		Method: in.Method, Path: in.Path, Query: in.Query, Host: in.Host,
		SourceAddress: in.SourceAddress, DestinationAddress: in.DestinationAddress,
		SourceSerial: in.SourceSerial,
	}
	if headers := in.HeaderMap(); len(headers) > 0 {
		req.Headers = make(map[string]*agentpb.HeaderValues, len(headers))
		for name, values := range headers {
			req.Headers[name] = &agentpb.HeaderValues{Values: values}
		}
	}
	return req
}

func decisionToPB(d policy.Decision) *agentpb.Decision {
	return &agentpb.Decision{
		Allow: d.Allow, Reason: string(d.Reason), RuleId: d.RuleID,
		DecisionId: d.DecisionID.String(), PolicyGeneration: d.Revision, DryRun: d.DryRun, LetThrough: d.LetThrough, Response: responseToPB(d.Response),
	}
}

func responseToPB(r *policy.Response) *agentpb.Response {
	if r == nil {
		return nil
	}
	return &agentpb.Response{
		Status: uint32(r.Status), Body: r.Body, Headers: fieldsToPB(r.Headers),
		ResponseHeaders: fieldsToPB(r.ResponseHeaders), RemoveHeaders: r.RemoveHeaders,
	}
}

func fieldsToPB(fields []policy.HeaderField) (pb []*agentpb.HeaderField) {
	for _, f := range fields {
		pb = append(pb, &agentpb.HeaderField{Name: f.Name, Value: f.Value})
	}
	return pb
}

func revocationToPB(r svid.Revocation) *agentpb.Revocation {
	pb := &agentpb.Revocation{BeforeRevision: r.BeforeRevision, Realm: r.Realm, AgentHandle: r.AgentHandle, Note: r.Note}
	if !r.ExpiresAt.IsZero() {
		pb.ExpiresAt = timestamppb.New(r.ExpiresAt)
	}
	switch {
	case r.SPIFFEID != "":
		pb.Subject = &agentpb.Revocation_SpiffeId{SpiffeId: r.SPIFFEID}
	case r.AgentID != "":
		pb.Subject = &agentpb.Revocation_AgentId{AgentId: r.AgentID}
	case r.AuthorityID != "":
		pb.Subject = &agentpb.Revocation_AuthorityId{AuthorityId: r.AuthorityID}
	default:
		pb.Subject = &agentpb.Revocation_Serial{Serial: r.Serial}
	}
	return pb
}

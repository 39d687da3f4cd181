// What an Envoy is told: how it answers a denial, and what it changes in a request
// that is allowed.

package extauthz

import (
	"encoding/base64"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

const (
	// identityHeader tells the server behind the Envoy who calls.
	identityHeader = "x-spiffe-id"
	// clientCertHeader claims an identity, and an Envoy can be told to hide it from
	// the agent: it is taken out of every request.
	clientCertHeader = "x-forwarded-client-cert"
)

// answer is what the Envoy is told of d.
func answer(c *call, d policy.Decision) *authv3.CheckResponse {
	m := &authv3.CheckResponse{DynamicMetadata: metadataOf(d)}
	switch {
	case d.Allow:
		m.Status = &statuspb.Status{Code: int32(codes.OK)}
		m.HttpResponse = &authv3.CheckResponse_OkResponse{OkResponse: allowed(c, d.Response)}
	case c.in.Protocol == policy.GRPC:
		m.Status, m.HttpResponse = deniedCall(d)
	default:
		a := denial.HTTP(d)
		m.Status = &statuspb.Status{Code: int32(codes.PermissionDenied)}
		m.HttpResponse = denied(a.Status, a.Fields, a.Body)
	}
	return m
}

func denied(status int, fields []policy.HeaderField, body string) *authv3.CheckResponse_DeniedResponse {
	return &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
		Status: &typev3.HttpStatus{Code: typev3.StatusCode(status)}, Headers: replacing(fields), Body: body,
	}}
}

// deniedCall is a denial to a gRPC client: Envoy makes grpc-status of the HTTP status,
// and grpc-message of the body. The details say the same again, to who reads them, and
// must not say another code.
func deniedCall(d policy.Decision) (*statuspb.Status, *authv3.CheckResponse_DeniedResponse) {
	told := denial.By(d)
	status := statusFor(told.GRPCStatus().Code())
	if status == 0 {
		told.Status, status = 0, statusFor(codes.PermissionDenied)
	}
	st := told.GRPCStatus()
	var fields []policy.HeaderField
	if d.Response != nil {
		fields = slices.DeleteFunc(slices.Clone(d.Response.Headers), func(f policy.HeaderField) bool { return f.Name == "content-type" })
	}
	fields = append(fields, policy.HeaderField{Name: denial.DecisionIDHeader, Value: d.DecisionID.String()})
	if details, err := proto.Marshal(st.Proto()); err == nil {
		fields = append(fields, policy.HeaderField{Name: "grpc-status-details-bin", Value: base64.RawStdEncoding.EncodeToString(details)})
	}
	return &statuspb.Status{Code: int32(st.Code()), Message: st.Message()}, denied(status, fields, st.Message())
}

// statusFor is the HTTP status of which Envoy makes the code; 0 where there is none.
func statusFor(code codes.Code) int {
	switch code {
	case codes.PermissionDenied:
		return 403
	case codes.Unauthenticated:
		return 401
	case codes.Unimplemented:
		return 404
	case codes.Unavailable:
		return 503
	case codes.Internal:
		return 400
	}
	return 0
}

// allowed has who calls in the place of whatever the caller said of that, and what
// the policy wants. Envoy takes fields out after it has put others in, so what is put
// in is never taken out.
func allowed(c *call, send *policy.Response) *authv3.OkHttpResponse {
	fields := []policy.HeaderField{{Name: identityHeader, Value: c.in.Source}}
	remove := append([]string{clientCertHeader}, c.forged...)
	m := &authv3.OkHttpResponse{}
	if send != nil {
		fields = append(fields, send.Headers...)
		remove = append(remove, send.RemoveHeaders...)
		for _, name := range c.names {
			if send.Replaces(name) { // in another spelling, too
				remove = append(remove, name)
			}
		}
		m.ResponseHeadersToAdd = unlessThere(send.ResponseHeaders)
	}
	m.Headers = replacing(joined(fields))
	slices.Sort(remove)
	m.HeadersToRemove = slices.DeleteFunc(slices.Compact(remove), func(name string) bool { return named(fields, name) })
	return m
}

// replacing are fields in the place of those of the same names.
func replacing(fields []policy.HeaderField) (options []*corev3.HeaderValueOption) {
	for i, f := range fields {
		action := corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
		if named(fields[:i], f.Name) {
			action = corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD
		}
		options = append(options, option(f, action))
	}
	return options
}

// joined has one field of each name: of several Envoy takes the last for a request.
func joined(fields []policy.HeaderField) (out []policy.HeaderField) {
	for _, f := range fields {
		if i := slices.IndexFunc(out, func(o policy.HeaderField) bool { return o.Name == f.Name }); i >= 0 {
			out[i].Value += "," + f.Value
			continue
		}
		out = append(out, f)
	}
	return out
}

// unlessThere are fields for the answer of the server behind, unless it sets one of
// the name. For several of one name Envoy has no such word: they go beside its own.
func unlessThere(fields []policy.HeaderField) (options []*corev3.HeaderValueOption) {
	for i, f := range fields {
		action := corev3.HeaderValueOption_ADD_IF_ABSENT
		if named(fields[:i], f.Name) || named(fields[i+1:], f.Name) {
			action = corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD
		}
		options = append(options, option(f, action))
	}
	return options
}

func option(f policy.HeaderField, action corev3.HeaderValueOption_HeaderAppendAction) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: f.Name, Value: f.Value}, AppendAction: action}
}

func named(fields []policy.HeaderField, name string) bool {
	return slices.ContainsFunc(fields, func(f policy.HeaderField) bool { return f.Name == name })
}

// metadataOf is what an access log of the Envoy can show of d.
func metadataOf(d policy.Decision) *structpb.Struct {
	fields := map[string]*structpb.Value{
		"decision_id": structpb.NewStringValue(d.DecisionID.String()),
		"reason":      structpb.NewStringValue(string(d.Reason)),
	}
	if d.RuleID != "" {
		fields["rule_id"] = structpb.NewStringValue(d.RuleID)
	}
	return &structpb.Struct{Fields: fields}
}

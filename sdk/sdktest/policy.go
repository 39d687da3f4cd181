// The rules of a trust domain as a policy: compiled for a workload, or decided for
// it call by call.

package sdktest

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"google.golang.org/grpc"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

// WatchPolicy implements the local API.
func (a *agent) WatchPolicy(_ *agentpb.WatchPolicyRequest, stream grpc.ServerStreamingServer[agentpb.WatchPolicyResponse]) error {
	for {
		res, changed := a.td.policyFor(a.id.String())
		if err := stream.Send(res); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (td *TD) policyFor(destination string) (*agentpb.WatchPolicyResponse, <-chan struct{}) {
	td.mu.Lock()
	defer td.mu.Unlock()
	p := &agentpb.Program{Destination: destination, Reason: "the test decides each call"}
	if td.compiled && td.decide == nil {
		src := sourceOf(td.rules, destination)
		src.Generation = td.policyGen
		p.Encoded, p.Reason = program.Encode(&src), ""
	}
	return &agentpb.WatchPolicyResponse{PolicyGeneration: td.policyGen, Programs: []*agentpb.Program{p}}, td.changed
}

// sourceOf is what rules say of calls to destination.
func sourceOf(rules []rule, destination string) program.Source {
	src := program.Source{Destination: destination}
	for i, r := range rules {
		if r.to != destination {
			continue
		}
		kind := program.Deny
		if r.allow {
			kind = program.Allow
		}
		for _, protocol := range []policy.Protocol{policy.GRPC, policy.HTTP, policy.TCP} {
			src.Grants = append(src.Grants, program.Grant{ID: fmt.Sprintf("rule-%06d-%s", i, protocol), Kind: kind, Protocol: protocol, From: []string{r.from}})
		}
	}
	return src
}

// Report implements the local API. Nobody asks for an explanation here.
func (a *agent) Report(stream grpc.ClientStreamingServer[agentpb.ReportRequest, agentpb.ReportResponse]) error {
	for {
		_, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&agentpb.ReportResponse{})
		}
		if err != nil {
			return err
		}
	}
}

// authorize is the decision of a call that is asked for alone.
func (td *TD) authorize(in *policy.Input) policy.Decision {
	td.mu.Lock()
	decide, rules, generation := td.decide, slices.Clone(td.rules), td.policyGen
	td.mu.Unlock()
	d := policy.Decision{Reason: policy.NoGrant}
	if decide != nil {
		d = decide(in)
	} else {
		for _, r := range rules {
			if r.from != in.Source || r.to != in.Destination {
				continue
			}
			if !r.allow {
				d = policy.Decision{Reason: policy.DenyRule}
				break
			}
			d = policy.Decision{Allow: true, Reason: policy.Allowed}
		}
	}
	if d.DecisionID.IsZero() {
		d.DecisionID = policy.NewDecisionID()
	}
	d.Revision = generation
	return d
}

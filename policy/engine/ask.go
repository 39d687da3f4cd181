package engine

// This file answers for calls that were made elsewhere or at another time: nobody waits
// for them, and they are not counted.

import (
	"context"
	"slices"
	"strings"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/engine/residual"
	"merlon.dev/policy/kept"
)

// Ask decides the call in as Authorize would have at the time at, but that OPA may take
// longer.
func (e *Engine) Ask(ctx context.Context, in *policy.Input, at time.Time) policy.Decision {
	if p, err := e.Program(ctx, in.Destination); err == nil {
		v := p.Decide(in, at)
		return policy.Decision{Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID, Revision: e.generation, Response: v.Response}
	}
	d, _ := e.decideAt(ctx, in, at, sampleLimit)
	return d
}

// MayRead says whether the policy may read a part of its input, by the name that a
// decision log has for it: "headers", or a JSON pointer such as
// "attributes/request/http/headers/x-team". Of what it does not know it says yes.
func (e *Engine) MayRead(part string) bool {
	segments := strings.Split(part, "/")
	last := segments[len(segments)-1]
	switch {
	case part == "rule_id" || part == "source_serial" || part == "dry_run": // of the decision, or for the record
		return false
	case segments[0] == "jwt":
		return e.readsJWT
	}
	reads, err := kept.Reads{}, error(nil)
	if e.ownRego {
		reads, err = residual.FindReads(e.program.compiler)
	}
	if err != nil || e.readsJWT {
		return true
	}
	for i, s := range segments {
		if s != "headers" && s != "headers_all" {
			continue
		}
		if i+1 == len(segments) {
			return reads.AllHeaders || len(reads.Headers) > 0
		}
		return reads.AllHeaders || slices.Contains(reads.Headers, segments[i+1])
	}
	switch {
	case last == "query" || segments[0] == "parsed_query":
		return reads.Query
	case last == "host":
		return reads.Host
	case last == "source_address":
		return reads.SourceAddress
	case last == "destination_address":
		return reads.DestinationAddress
	}
	return true
}

package replay

// What package decisionlog writes is read here as it was meant.

import (
	"strings"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
)

func TestOwnDecisionLogIsReplayed(t *testing.T) {
	e := load(t, newPolicy, map[string]string{"a.rego": "package authz\n\nallow if input.attributes.request.http.headers[\"x-team\"] == \"shop\"\n"})
	recorder := decisionlog.NewRecorder(decisionlog.Options{Records: 16})
	format := decisionlog.Format{Bundle: "main", Mask: decisionlog.Mask{Headers: []string{"user-agent"}}}
	at := time.Date(2026, 5, 1, 10, 0, 0, 0, time.UTC)
	add := func(d policy.Decision, standsFor uint64, change func(*policy.Input)) {
		t.Helper()
		in := policy.Input{
			Source: "spiffe://x.test/web", Destination: "spiffe://x.test/orders", Protocol: policy.HTTP, Method: "GET", Path: "/orders/1", Query: "a=1",
			Headers: policy.HeaderMap{"x-team": {"shop"}, "user-agent": {"curl"}}, SourceAddress: "10.0.0.1:4000",
		}
		change(&in)
		d.DecisionID, d.Revision = policy.NewDecisionID(), 3
		recorder.Add(&in, &d, at, standsFor, 0)
	}
	yes, no := policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "before"}, policy.Decision{Reason: policy.NoGrant}
	same := func(*policy.Input) {}
	add(no, 1, same)
	add(yes, 40, func(in *policy.Input) { in.Method = "POST" })
	add(policy.Decision{Reason: policy.BadRequest}, 1, func(in *policy.Input) { in.Path = "/\xff" })
	add(no, 1, func(in *policy.Input) { in.HeaderMap()["user-agent"] = []string{"caf\xe9"} })
	add(no, 1, func(in *policy.Input) {
		in.Protocol, in.Method, in.Path, in.Headers, in.Query = policy.TCP, "", "", nil, ""
	})
	add(policy.Decision{Reason: policy.Revoked}, 1, same)
	var lines []string
	for recorder.Waiting() {
		recorder.Take(16, func(rec *decisionlog.Record) { lines = append(lines, string(format.Line(rec, 5))) })
	}
	r, bad, err := read(t, e, strings.Join(lines, "\n"))
	if err != nil || len(bad) > 0 || len(lines) != 6 {
		t.Fatalf("%d lines, %v, bad %q", len(lines), err, bad)
	}
	if r.Events != 3 || r.Calls != 42 || r.Sampled != 1 || r.Incomplete != 2 || r.Missing != 30 || r.Erased != 1 || r.Before[policy.Revoked] != 1 || r.Before[policy.BadRequest] != 1 {
		t.Errorf("report %s", toJSON(t, r))
	}
	if len(r.Changed) != 2 || r.Changed[0].Calls != 40 || r.Changed[0].After.Reason != policy.MethodNotGranted || r.Changed[0].Before.RuleID != "before" || r.Changed[1].After.RuleID != "reads" {
		t.Errorf("changed %s", toJSON(t, r.Changed))
	}
}

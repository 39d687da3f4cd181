// What audit mode lets through, and until when.

package sdk

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/policy"
)

func TestAuditModeLetsThroughWhatAPolicyDeniesAndNothingElse(t *testing.T) {
	now := time.Now()
	a := &audit{until: now.Add(time.Hour)}
	want := map[policy.Reason]bool{
		policy.Allowed: false, policy.DenyRule: true, policy.NoGrant: true, policy.MethodNotGranted: true, policy.PathNotGranted: true,
		policy.NoBundle: true, policy.StalePolicy: true, policy.AgentUnavailable: true, policy.Error: true,
		policy.NoIdentity: false, policy.Revoked: false, policy.Expired: false, policy.StaleRevocations: false, policy.BadRequest: false,
	}
	for _, r := range policy.Reasons() {
		let, known := want[r]
		if !known {
			t.Errorf("this test does not know whether audit mode lets %s through", r)
		}
		if got := a.lets(r, now); got != let {
			t.Errorf("lets(%s) = %v", r, got)
		}
		if a.lets(r, a.until) || new(audit).lets(r, now) {
			t.Errorf("%s is let through after the end, or without audit mode", r)
		}
	}
	if a.lets("A_NEW_REASON", now) {
		t.Error("a reason that nobody knows is let through")
	}
}

func TestAuditModeHasAnEnd(t *testing.T) {
	now := time.Now()
	at := func(d time.Duration) *time.Time { end := now.Add(d); return &end }
	for name, test := range map[string]struct {
		options
		ok bool
	}{
		"not asked for":                  {options{}, true},
		"a date":                         {options{AuditUntil: at(time.Hour)}, true},
		"a date that has passed":         {options{AuditUntil: at(-time.Hour)}, true},
		"both":                           {options{AuditUntil: at(time.Hour), PlaintextUntil: at(time.Hour)}, true},
		"both, passed":                   {options{AuditUntil: at(-time.Hour), PlaintextUntil: at(-2 * time.Hour)}, true},
		"no date":                        {options{AuditUntil: new(time.Time)}, false},
		"never":                          {options{AuditUntil: at(maxAudit + time.Minute)}, false},
		"plaintext alone":                {options{PlaintextUntil: at(time.Hour)}, false},
		"plaintext without a date":       {options{AuditUntil: at(time.Hour), PlaintextUntil: new(time.Time)}, false},
		"plaintext after the audit mode": {options{AuditUntil: at(time.Hour), PlaintextUntil: at(time.Hour + 1)}, false},
	} {
		if err := new(audit).set(&test.options, now); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What audit mode has let through ends with it, while it is under way.
func TestCallsUnderWayEndWithAuditMode(t *testing.T) {
	for name, test := range map[string]struct {
		audit, plaintext time.Duration
		source           string
		ended            bool
	}{
		"audited":         {time.Hour, time.Hour, "spiffe://sdktest.test/web", false},
		"audit over":      {-time.Hour, -time.Hour, "spiffe://sdktest.test/web", true},
		"plaintext":       {time.Hour, time.Hour, "", false},
		"plaintext over":  {time.Hour, -time.Hour, "", true},
		"everything over": {-time.Hour, -time.Hour, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			id := bare()
			id.audit.until, id.audit.plaintext = time.Now().Add(test.audit), time.Now().Add(test.plaintext)
			ended := false
			c := &Call{id: id, in: &policy.Input{Source: test.source}, ended: func(policy.Decision) { ended = true }}
			id.calls.add(c)
			if test.source == "" {
				id.redecide(context.Background(), false)
			} else {
				id.endCall(context.Background(), c, policy.Deny(policy.NoGrant))
			}
			if ended != test.ended {
				t.Errorf("the call has ended: %v", ended)
			}
		})
	}
}

// The same by the clock, with a compiled policy; and a call that goes on is not
// reported each second.
func TestAuditModeEndsByTheClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := withProgram(t, 7)
		id.audit.until = time.Now().Add(10 * time.Second)
		id.startAudit(t.Context())
		go id.followCalls(t.Context())
		in := web("/a")
		in.Source, in.Destination = "spiffe://sdktest.test/eve", ownID
		d := id.Authorize(t.Context(), in)
		if !Audited(d) || d.Reason != policy.NoGrant {
			t.Fatalf("%+v", d)
		}
		ended := make(chan policy.Decision, 1)
		defer id.Follow(in, d, func(d policy.Decision) { ended <- d })()
		time.Sleep(9 * time.Second)
		synctest.Wait()
		if len(ended) != 0 {
			t.Fatalf("it ended before audit mode: %+v", <-ended)
		}
		if m := id.report.message(); len(m.GetRecords()) != 1 || m.GetRecords()[0].GetDecision().GetAllow() || !m.GetRecords()[0].GetDecision().GetLetThrough() {
			t.Errorf("reported: %v; want one denial, as it was decided, that was let through", m)
		}
		id.report.sent()
		time.Sleep(time.Second)
		synctest.Wait()
		if len(ended) != 1 || id.Authorize(t.Context(), in).Allow {
			t.Error("audit mode goes on after its end")
		}
		for _, rec := range id.report.message().GetRecords() {
			if rec.GetDecision().GetLetThrough() {
				t.Errorf("reported as let through after the end: %v", rec)
			}
		}
	})
}

// Whatever enforcement point asks, an ambiguous path over plaintext is one too.
func TestPlaintextPathsAreChecked(t *testing.T) {
	id := bare()
	id.audit.until, id.audit.plaintext = time.Now().Add(time.Hour), time.Now().Add(time.Hour)
	for path, want := range map[string]policy.Reason{"/a/b": policy.NoIdentity, "/a/../b": policy.BadRequest} {
		ctx, d := id.Decide(t.Context(), nil, &policy.Input{Source: "spiffe://sdktest.test/web", Protocol: policy.HTTP, Method: "GET", Path: path})
		if d.Reason != want || d.Allow != (want == policy.NoIdentity) {
			t.Errorf("%s: %+v", path, d)
		}
		rec := id.report.message().GetRecords()[0].GetDecision()
		if id.report.sent(); rec.GetAllow() || rec.GetLetThrough() != d.Allow {
			t.Errorf("%s: reported as %v", path, rec)
		}
		if peer, ok := PeerFromContext(ctx); ok {
			t.Errorf("%s: the caller is %s", path, peer.ID)
		}
	}
}

func TestPlaintextCallersAreCountedWithinBounds(t *testing.T) {
	var a audit
	for i := range 2 * maxPlaintextCallers {
		a.sawPlaintext(string(rune('a'+i%26))+time.Duration(i).String()+":1", true, time.Now())
	}
	a.sawPlaintext("192.0.2.1:5", false, time.Now())
	if n := len(a.callers); n != maxPlaintextCallers+1 {
		t.Errorf("%d callers are kept", n)
	}
	if c := a.callers[otherCallers]; c == nil || c.Calls != maxPlaintextCallers || c.Refused != 1 {
		t.Errorf("the others: %+v", c)
	}
}

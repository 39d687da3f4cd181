// An agent that asks for SVIDs without end, over the real port: it gets its share,
// is told why and when there is more, and takes nothing from the others.

package ca_test

import (
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
)

// drain asks until it is refused, and returns how many calls succeeded.
func drain(t *testing.T, ask func() error) (got int, refusal error) {
	t.Helper()
	for got < 2000 {
		if refusal = ask(); refusal != nil {
			return got, refusal
		}
		got++
	}
	t.Fatalf("%d calls, and none is refused", got)
	return 0, nil
}

func TestAgentThatAsksWithoutEndHasItsShare(t *testing.T) {
	const rate = 10
	c := startCA(t, tempDir(t), func(cfg *ca.Config) { cfg.AgentIssueRate = rate })
	mad, good := c.agent("n1"), c.agent("n2")
	entry, other := c.entry("n1", "web"), c.entry("n2", "db")
	req := &capb.SignJWTRequest{}
	for range 100 {
		req.Items = append(req.Items, &capb.SignJWTItem{EntryId: entry.GetEntryId(), Audience: []string{"db"}})
	}
	begun := time.Now()
	calls, err := drain(t, func() error { _, err := mad.node.SignJWT(t.Context(), req); return err })
	most := (rate + 1.0/20) * (60 + time.Since(begun).Seconds())
	if issued := 100 * calls; float64(issued) > most || issued < 600 {
		t.Errorf("%d SVIDs were issued; want the 600 of a minute, and at most %.0f", issued, most)
	}
	wait := wantQuota(t, err)
	if wait < time.Millisecond || wait > 10*time.Second {
		t.Errorf("it is told to wait for %s for 100 SVIDs at 10 a second", wait)
	}
	if !c.refusalRecorded(status.Convert(err).Message()) {
		t.Error("the refusal is not in the audit log")
	}
	recorded := 0
	for _, r := range c.issuances() {
		if r["detail"] == "JWT" {
			recorded++
		}
	}
	if recorded != 100*calls {
		t.Errorf("the audit log has %d JWT-SVIDs; want %d", recorded, 100*calls)
	}
	// X509-SVIDs are from the same share.
	csrs := make([]*capb.SignItem, 500)
	for i := range csrs {
		csrs[i] = &capb.SignItem{EntryId: entry.GetEntryId()}
	}
	_, err = mad.node.Sign(t.Context(), &capb.SignRequest{Items: csrs})
	wantQuota(t, err)

	good.svid(other)
	renew := func() error { return renewWith(t, mad, freshCSR(t)) }
	begun = time.Now()
	renewals, err := drain(t, renew)
	wantQuota(t, err)
	if most := 60 + time.Since(begun).Seconds(); renewals < 1 || float64(renewals) > most {
		t.Errorf("the agent's own SVID was renewed %d times; want 60 or so, though the other share is used up, and at most %.0f", renewals, most)
	}
	if n := c.counter(t, "merlon_agent_issue_quota_refusals_total"); n != 3 {
		t.Errorf("%d refusals are counted; want 3", n)
	}
}

func freshCSR(t *testing.T) []byte {
	_, csr := newCSR(t)
	return csr
}

// wantQuota wants err to be a refusal for want of a share, and returns after how
// long to ask again.
func wantQuota(t *testing.T, err error) (wait time.Duration) {
	t.Helper()
	wantCode(t, err, codes.ResourceExhausted)
	reason := ""
	for _, d := range status.Convert(err).Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			reason = d.GetReason()
		case *errdetails.RetryInfo:
			wait = d.GetRetryDelay().AsDuration()
		}
	}
	if reason != "ISSUE_QUOTA" || wait <= 0 {
		t.Errorf("refused for reason %q, to wait for %s: %v", reason, wait, err)
	}
	return wait
}

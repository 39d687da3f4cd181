// Clocks that are off by an hour, the CA's or an agent's: what was issued before a
// ban is out, and what was issued after it is not, whatever dates say.

package api

import (
	"testing"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
)

func TestWhatABanCutsOffDoesNotDependOnClocks(t *testing.T) {
	s, agent := newService(t)
	banned, err := s.BanAgent(as(t, admin()), &capb.BanAgentRequest{Agent: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	record := banned.GetRevocation()
	// A CA whose clock was an hour behind would have written an end so much earlier:
	// an SVID issued by another's clock just before must have ended by then.
	if end := record.GetExpiresAt().AsTime().Add(-time.Hour); end.Before(time.Now().Add(entry.MaxSVIDTTL)) {
		t.Errorf("the record ends at %s, an hour too early by a clock that is behind: an SVID can live until %s", end, time.Now().Add(entry.MaxSVIDTTL))
	}
	for _, off := range []time.Duration{-time.Hour, 0, time.Hour} {
		p := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision)
		p.NotBefore, p.NotAfter = time.Now().Add(off), time.Now().Add(off+2*time.Hour)
		if c := s.PeerCaller(p); c.Is(capb.Caller_CALLER_AGENT) || c.Refusal != capb.Refusal_REFUSAL_AGENT_BANNED {
			t.Errorf("an SVID from before the ban, dated %s from it: %+v; want a banned agent", off, c)
		}
	}
	// Let in again, it attests at a revision above the record's.
	if _, err := s.UnbanAgent(as(t, admin()), &capb.UnbanAgentRequest{Agent: "n1"}); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token, err := attest.CreateJoinToken(t.Context(), s.opts.Store, "n1", now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	again, err := attest.RedeemJoinToken(t.Context(), s.opts.Store, td, token, now, now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.registry.Wait(t.Context(), again.Revision); err != nil {
		t.Fatal(err)
	}
	for _, off := range []time.Duration{-time.Hour, 0, time.Hour} {
		before, after := peerOf(t, agent.ID.String(), agent.Handle, agent.Revision), peerOf(t, agent.ID.String(), agent.Handle, again.Revision)
		before.NotBefore, before.NotAfter = now.Add(time.Minute), now.Add(3*time.Hour) // dated later than what is good
		after.NotBefore, after.NotAfter = now.Add(off-time.Hour), now.Add(off+2*time.Hour)
		if c := s.PeerCaller(before); c.Is(capb.Caller_CALLER_AGENT) || c.Refusal != capb.Refusal_REFUSAL_SVID_REVOKED {
			t.Errorf("an SVID from before the ban, dated after it: %+v; want a revoked one", c)
		}
		if c := s.PeerCaller(after); !c.Is(capb.Caller_CALLER_AGENT) {
			t.Errorf("an SVID from after the ban, dated %s from now: %+v; want the agent", off-time.Hour, c)
		}
	}
}

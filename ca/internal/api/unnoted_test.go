// Renewals that the store has not taken.

package api

import (
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// stored is the end of the agent's SVIDs as the store has it.
func (s *Service) stored(t *testing.T, a *attest.Agent) time.Time {
	t.Helper()
	kv, _, err := s.opts.Store.Get(t.Context(), attest.AgentPrefix+"n1")
	if err != nil {
		t.Fatal(err)
	}
	now, err := attest.DecodeAgent(kv)
	if err != nil || now.ID != a.ID {
		t.Fatalf("agent = %+v, %v", now, err)
	}
	return now.NotAfter
}

func TestRenewalWithoutTheStoreIsNotedLater(t *testing.T) {
	s, agent := newService(t)
	end := agent.NotAfter.Add(time.Hour).Truncate(time.Second)
	s.SetStale(true)
	caller := &Caller{Name: agent.ID.String(), Agent: agent, Peer: peerOf(t, agent.ID.String(), agent.Handle, 1)}
	if err := s.renewed(t.Context(), caller, attest.SVID{Serial: "0b", NotAfter: end}); err != nil {
		t.Fatal(err)
	}
	if got := s.stored(t, agent); !got.Equal(agent.NotAfter) {
		t.Fatalf("noted %s while the store is away", got)
	}
	select {
	case <-s.Unnoted():
	default:
		t.Error("nobody is told that there is something to note")
	}
	s.SetStale(false)
	if err := s.NoteRenewals(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := s.stored(t, agent); !got.Equal(end) {
		t.Errorf("the store says that it ends at %s; want %s", got, end)
	}
	// Another replica renewed it meanwhile: that stays.
	later := end.Add(time.Hour)
	last := attest.SVID{Serial: "0b", NotAfter: end}
	if err := attest.Renewed(t.Context(), s.opts.Store, agent.ID, last, attest.SVID{Serial: "0c", NotAfter: later}); err != nil {
		t.Fatal(err)
	}
	s.unnoted.add(agent.ID, attest.SVID{}, last)
	if err := s.NoteRenewals(t.Context()); err != nil || len(s.unnoted.all()) != 0 {
		t.Errorf("NoteRenewals = %v, %d left", err, len(s.unnoted.all()))
	}
	if got := s.stored(t, agent); !got.Equal(later) {
		t.Errorf("the store says that it ends at %s; want %s, as another replica said", got, later)
	}
	// What cannot be noted is kept; who is gone is not waited for.
	if err := s.opts.Store.Close(); err != nil {
		t.Fatal(err)
	}
	s.unnoted.add(agent.ID, attest.SVID{}, attest.SVID{Serial: "0d", NotAfter: later.Add(time.Hour)})
	if err := s.NoteRenewals(t.Context()); err == nil || len(s.unnoted.all()) != 1 {
		t.Errorf("NoteRenewals without a store = %v, %d left; want an error, and 1", err, len(s.unnoted.all()))
	}
}

func TestAgentThatIsGoneIsNotNoted(t *testing.T) {
	s, agent := newService(t)
	write(t, s, store.Delete(attest.AgentPrefix+"n1"))
	s.unnoted.add(agent.ID, attest.SVID{}, attest.SVID{Serial: "0b", NotAfter: time.Now().Add(time.Hour)})
	if err := s.NoteRenewals(t.Context()); err != nil || len(s.unnoted.all()) != 0 {
		t.Errorf("NoteRenewals = %v, %d left; want none", err, len(s.unnoted.all()))
	}
}

// A replica that was killed while it was cut off knows from its log whom it
// renewed.
func TestRenewalsBeforeAKillAreNoted(t *testing.T) {
	s, agent := newService(t)
	serial, err := svid.NewSerial(agent.Handle, 1)
	if err != nil {
		t.Fatal(err)
	}
	end := agent.NotAfter.Add(30 * time.Minute).Truncate(time.Second).UTC()
	for i, until := range []time.Time{end.Add(-10 * time.Minute), end, time.Now().Add(-time.Minute)} {
		if err := s.opts.Audit.Append(t.Context(), audit.Record{
			Time: time.Now(), Type: audit.Renew, Actor: agent.ID.String(), SPIFFEID: agent.ID.String(), Serial: serial.String(),
			KeyID: strings.Repeat([]string{"0a", "0b", "0c"}[i], 32), NotAfter: until,
		}); err != nil {
			t.Fatal(err)
		}
	}
	s.RememberKeys(t.Context(), time.Now())
	if err := s.NoteRenewals(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := s.stored(t, agent); !got.Equal(end) {
		t.Errorf("the store says that it ends at %s; want %s, as the audit log does", got, end)
	}
}

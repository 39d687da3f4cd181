// What Sync pushes, and that nothing acknowledged is lost across a restart.

package ca_test

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

func timestampOf(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

func TestSyncPushesEveryChange(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	stream := a.sync(0)
	listing := until(t, stream, synced)
	if !listing.GetReset_() || listing.GetTrustBundle().GetSequence() != 1 || listing.GetSentAt() == nil {
		t.Errorf("first message = %v; want a reset with the trust bundle and the CA's clock", listing)
	}

	e := c.entry("n1", "web")
	msg := until(t, stream, func(m *capb.SyncResponse) bool { return len(m.GetEntries()) > 0 })
	if msg.GetEntries()[0].GetEntryId() != e.GetEntryId() || msg.GetReset_() || !msg.GetSynced() || msg.GetRevision() < e.GetRevision() {
		t.Errorf("after create: %v", msg)
	}
	c.entry("other", "elsewhere") // another node's: no concern of this one

	serial, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{Serial: "abc"}, Note: "lost"})
	if err != nil {
		t.Fatal(err)
	}
	msg = until(t, stream, func(m *capb.SyncResponse) bool {
		if len(m.GetEntries()) > 0 {
			t.Errorf("another node's entry was pushed: %v", m)
		}
		return len(m.GetRevocations()) > 0
	})
	if got := msg.GetRevocations()[0]; got.GetSerial() != "abc" || got.GetBeforeRevision() != 0 || got.GetNote() != serial.GetRevocation().GetNote() {
		t.Errorf("after revoke: %v", msg)
	}

	deleted, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: e.GetEntryId()})
	if err != nil {
		t.Fatal(err)
	}
	msg = until(t, stream, func(m *capb.SyncResponse) bool { return len(m.GetRemovedEntryIds()) > 0 })
	if msg.GetRemovedEntryIds()[0] != e.GetEntryId() {
		t.Errorf("after delete: %v", msg)
	}
	// In the same message: nobody sees an entry gone whose SVIDs still count.
	if len(msg.GetRevocations()) != 1 || msg.GetRevocations()[0].GetSpiffeId() != e.GetSpiffeId() ||
		msg.GetRevocations()[0].GetBeforeRevision() != deleted.GetRevocation().GetBeforeRevision() {
		t.Errorf("after delete: revocations %v; want %v", msg.GetRevocations(), deleted.GetRevocation())
	}

	pushPolicy(t, c)
	msg = until(t, stream, func(m *capb.SyncResponse) bool { return m.GetPolicyBundle() != nil })
	if p := msg.GetPolicyBundle(); p.GetName() != "main" || p.GetGeneration() != 1 || len(p.GetKeys()) != 1 {
		t.Errorf("after push: %v", msg)
	}
}

// A question is answered at once, by a time that was taken after it: three of them, where
// the next heartbeats would outlast the stream.
func TestSyncAnswersWithTheTime(t *testing.T) {
	c := startCA(t, tempDir(t))
	stream := c.agent("n1").sync(0)
	if first := until(t, stream, synced); first.GetAnswers() != 0 {
		t.Errorf("nothing was asked, and %d is answered", first.GetAnswers())
	}
	for question := uint64(1); question <= 3; question++ {
		asked := time.Now()
		if err := stream.Send(&capb.SyncRequest{Ask: question}); err != nil {
			t.Fatal(err)
		}
		msg := until(t, stream, func(m *capb.SyncResponse) bool { return m.GetAnswers() == question })
		if at := msg.GetSentAt().AsTime(); at.Before(asked.Round(0)) {
			t.Errorf("question %d of %s is answered as of %s", question, asked, at)
		}
		if within := msg.GetNextWithin().AsDuration(); within != 9*time.Second {
			t.Errorf("the next message is promised within %v; want 9 s, with one agent", within)
		}
	}
}

func TestAgentListShowsAcknowledgements(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	stream := a.sync(0)
	at := until(t, stream, synced).GetRevision()
	if err := stream.Send(&capb.SyncRequest{Ack: &capb.SyncAck{Revision: at, TrustBundleSequence: 1}}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		list, err := c.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		got := list.GetAgents()[0]
		if got.GetConnected() && got.GetAck().GetRevision() == at && got.GetSpiffeId() == a.id {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("agents = %v; want %s connected with ack %d", list.GetAgents(), a.id, at)
		}
	}
}

func TestEverythingAcknowledgedSurvivesARestart(t *testing.T) {
	dir := tempDir(t)
	c := startCA(t, dir)
	a := c.agent("n1")
	kept, gone, old := c.entry("n1", "kept"), c.entry("n1", "gone"), c.entry("n1", "old")
	used, fresh := c.joinToken("used"), c.joinToken("fresh")
	_, csr := newCSR(t)
	if _, err := c.client(nil, nil).node.Attest(t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: used}, Csr: csr}); err != nil {
		t.Fatal(err)
	}
	pushPolicy(t, c)
	if generation := pushPolicy(t, c); generation != 2 {
		t.Fatalf("second push has generation %d; want 2", generation)
	}
	root := c.srv.Root()
	resume := until(t, a.sync(0), synced).GetRevision()
	// What happens between the agent's last message and the restart is only in
	// the store's history.
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: gone.GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	c.stop()

	c = startCA(t, dir)
	if !c.srv.Root().Equal(root) {
		t.Fatal("the restarted CA has another root")
	}
	fresher := c.entry("n1", "fresher")
	a = c.client(a.key, a.chain)
	msg := until(t, a.sync(resume), synced)
	if msg.GetReset_() {
		t.Error("resuming gave a full listing; want only what changed")
	}
	if len(msg.GetEntries()) != 1 || msg.GetEntries()[0].GetEntryId() != fresher.GetEntryId() {
		t.Errorf("resuming gave entries %v; want only the new one", msg.GetEntries())
	}
	if len(msg.GetRemovedEntryIds()) != 1 || msg.GetRemovedEntryIds()[0] != gone.GetEntryId() || len(msg.GetRevocations()) != 1 {
		t.Errorf("resuming gave %v; want the removal and its revocation", msg)
	}
	if msg.GetTrustBundle() != nil || msg.GetPolicyBundle() != nil {
		t.Errorf("resuming repeats what did not change: %v", msg)
	}
	listing := until(t, a.sync(0), synced)
	if len(listing.GetEntries()) != 3 {
		t.Errorf("full listing has %d entries; want %s, %s and the new one", len(listing.GetEntries()), kept.GetEntryId(), old.GetEntryId())
	}
	node := c.client(nil, nil).node
	_, csr = newCSR(t) // the key of the one before is known, too
	_, err := node.Attest(t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: used}, Csr: csr})
	wantCode(t, err, codes.PermissionDenied)
	if _, err := node.Attest(t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_JoinToken{JoinToken: fresh}, Csr: csr}); err != nil {
		t.Errorf("the unused token is lost: %v", err)
	}
	if generation := pushPolicy(t, c); generation != 3 {
		t.Errorf("after the restart the next generation is %d; want 3", generation)
	}
}

// An agent that says that it is ahead of the store (an older backup was restored,
// or it lies) gets nothing: what it holds, the store does not know.
func TestAgentFromTheFutureIsRefused(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	_, err := ended(t, a.sync(1<<40))
	wantCode(t, err, codes.FailedPrecondition)
	if msg := until(t, a.sync(0), synced); !msg.GetReset_() {
		t.Errorf("first message = %v; want a full listing for who holds nothing", msg)
	}
}

func TestLargeListingComesInParts(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	const entries = 200
	for i := range entries {
		e := newEntry("n1", "w"+string(rune('a'+i%26))+string(rune('a'+i/26)))
		for range 3 {
			e.Selectors = append(e.Selectors, &capb.Selector{Type: "unix", Value: longPath(len(e.GetSelectors()))})
		}
		if _, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e}); err != nil {
			t.Fatal(err)
		}
	}
	stream := a.sync(0)
	got, messages := 0, 0
	until(t, stream, func(m *capb.SyncResponse) bool {
		messages++
		got += len(m.GetEntries())
		if m.GetReset_() != (messages == 1) {
			t.Errorf("message %d: reset = %v", messages, m.GetReset_())
		}
		if !m.GetSynced() && m.GetRevision() != 0 {
			t.Error("an unfinished listing names a revision from which an agent would resume")
		}
		return m.GetSynced()
	})
	if got != entries || messages < 2 {
		t.Errorf("%d entries in %d messages; want %d in several", got, messages, entries)
	}
}

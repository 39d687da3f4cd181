// What can become of one replica: cut off from the store, set back, refusing.

package fakeca

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
)

// CutOff separates the replica from the store, or joins it again: it then says
// so on all streams, and hears of no change.
func (ca *CA) CutOff(cut bool) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if ca.cutOff == cut {
		return
	}
	messages := []*capb.SyncResponse{{Revision: ca.revision, Synced: true, Stale: true, SentAt: timestamppb.Now()}}
	if ca.cutOff = cut; cut {
		ca.frozen = ca.revision
	} else {
		messages = ca.messages(ca.frozen, ca.revision)
	}
	for ch := range ca.streams {
		for _, m := range messages {
			ch <- m
		}
	}
}

// Nest makes the replica a nested CA's that heard the one above this long ago, in what
// it says when a stream begins.
func (ca *CA) Nest(upstreamAge time.Duration) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.upstreamAge = upstreamAge
}

// Beat says on all streams of the replica that it is there.
func (ca *CA) Beat() {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	m := ca.beat()
	for ch := range ca.streams {
		ch <- m
	}
}

func (ca *CA) heartbeat() *capb.SyncResponse {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.beat()
}

// beat is what Beat says. mu is held.
func (ca *CA) beat() *capb.SyncResponse {
	m := &capb.SyncResponse{Revision: ca.revision, Synced: true, SentAt: timestamppb.Now()}
	if ca.cutOff {
		m.Revision, m.Stale = ca.frozen, true
	}
	return m
}

// Jump sets the store's revision, as a restored backup would.
func (ca *CA) Jump(revision uint64) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision = revision
}

// Refuse makes Sync fail with err; nil ends it.
func (ca *CA) Refuse(err error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.refusal = err
}

// LoseAttest makes the answers to evidence get lost after the token was taken.
func (ca *CA) LoseAttest() {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.loseAttest = true
}

// ServePolicy serves a signed policy bundle without an announcement.
func (ca *CA) ServePolicy(raw []byte, generation uint64) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.published = &bundle.Published{Raw: raw, ETag: fmt.Sprintf(`"served-%d"`, generation), Generation: generation}
}

// Streams counts the open Sync streams.
func (ca *CA) Streams() int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return len(ca.streams)
}

// Fetches counts how often a policy bundle was asked for.
func (ca *CA) Fetches() int {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.fetches
}

// Reopen gives the opening of the store a name.
func (ca *CA) Reopen(opening string) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.opening = []byte(opening)
}

// Seen lists what agents said to have seen, for each stream so far.
func (ca *CA) Seen() []*capb.Seen {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return append([]*capb.Seen(nil), ca.seen...)
}

// Revision is that of the store.
func (ca *CA) Revision() uint64 {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.revision
}

// SetSequence sets that of the trust bundle, as a replica that is behind has
// it.
func (ca *CA) SetSequence(sequence uint64) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.sequence = sequence
}

// RenewToken makes Token work once more.
func (ca *CA) RenewToken() {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.tokenUsed = false
}

// Feeds: what one Sync stream has yet to learn. A feed holds names, never
// contents, so changes that come faster than the stream sends fall together,
// and a stream that stands still holds up nobody and costs a bounded set of
// names.

package registry

import (
	"cmp"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/trust"
)

// maxPending is how many changed entries a feed remembers by name; beyond it
// the stream gets a full listing.
const maxPending = 10_000

// Update is everything that a stream must be told to be at Revision.
type Update struct {
	Revision uint64
	// Reset: this is a full listing; what it does not repeat is gone.
	Reset       bool
	Entries     []*entry.Entry
	Removed     []string
	Trust       *trust.Bundle // nil: unchanged
	Revocations []*revocation.Record
	Heads       []*release.Head // policy bundles that changed, or whose keys did
	// Federated are the trust bundles of all trust domains that the node's entries
	// federate with, if that changed (FederatedChanged).
	Federated        []*trust.Federated
	FederatedChanged bool
}

// Feed belongs to one Sync stream.
type Feed struct {
	registry *Registry
	agent    spiffeid.ID
	number   uint64 // of the order in which feeds were opened
	signal   chan struct{}
	closing  chan struct{} // closed when a newer feed takes its place

	// aliases are those of the agent's node: read with mu or feeds.mu held, replaced
	// with both.
	aliases []spiffeid.ID

	// mu guards what follows. Where a change concerns the feed it is held while the
	// picture is replaced, so that Take sees both or neither; of any other change Take
	// learns from the picture alone.
	mu      sync.Mutex
	last    uint64 // the stream knows everything up to here
	reset   bool
	pending map[string]struct{} // entries changed since

	// federated says which federated trust bundles the stream was told of; empty:
	// nothing yet. Of Take alone.
	federated string
}

// catchUp marks what changed for f's node after f.last, up to pic; later
// changes are marked as they come.
func (f *Feed) catchUp(pic *picture, parents []spiffeid.ID, gone []removal) {
	f.mu.Lock()
	since, reset := f.last, f.reset
	f.mu.Unlock()
	if reset {
		return
	}
	var changed []string
	for e := range pic.entries.below(parents...) {
		if e.Revision > since {
			changed = append(changed, e.ID)
		}
	}
	for _, g := range gone {
		if slices.Contains(parents, g.parent) {
			changed = append(changed, g.id)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range changed {
		f.mark(id)
	}
}

// parents are whose entries concern the node. f.mu is held.
func (f *Feed) parents() []spiffeid.ID { return append([]spiffeid.ID{f.agent}, f.aliases...) }

// Superseded is closed when a newer feed of the agent has taken f's place.
func (f *Feed) Superseded() <-chan struct{} { return f.closing }

// Due receives when there is something to take.
func (f *Feed) Due() <-chan struct{} { return f.signal }

// Take returns what the stream must be told to be at the current revision; the
// next Take begins there. One goroutine at a time calls it.
func (f *Feed) Take(now time.Time) Update {
	pic, parents, since, reset, pending := f.begin()
	u := Update{Revision: pic.revision, Reset: reset}
	if reset {
		u.Entries = slices.Collect(pic.entries.below(parents...))
	} else {
		u.Entries, u.Removed = pic.entries.now(parents, pending)
	}
	u.Revocations = pic.revocations.After(since, time.Time{}) // the agent judges by its own clock what has expired
	if pic.trust != nil && pic.trust.Revision > since {
		u.Trust = pic.trust
	}
	for _, h := range pic.heads {
		if max(h.Revision, pic.replicas.keysAt) > since {
			u.Heads = append(u.Heads, h)
		}
	}
	slices.SortFunc(u.Heads, func(a, b *release.Head) int { return strings.Compare(a.Name, b.Name) })
	if reset {
		f.federated = "" // what was told of is forgotten there
	}
	if f.federated == "" || len(pending) > 0 || pic.federated.changedAt > since {
		u.Federated, u.FederatedChanged = f.federatedNews(pic, parents)
	}
	return u
}

// begin hands over what is due as of one picture; nobody is held up while it
// is looked up there.
func (f *Feed) begin() (pic *picture, parents []spiffeid.ID, since uint64, reset bool, pending map[string]struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	pic, parents, since, reset = f.registry.pic.Load(), f.parents(), f.last, f.reset
	if reset {
		since = 0
	}
	if len(f.pending) > 0 {
		pending, f.pending = f.pending, make(map[string]struct{})
	}
	f.last, f.reset = pic.revision, false
	return pic, parents, since, reset, pending
}

// below goes over what hangs below parents, one after the other, each ordered by
// ID.
func (s *entries) below(parents ...spiffeid.ID) iter.Seq[*entry.Entry] {
	return func(yield func(*entry.Entry) bool) {
		for _, parent := range parents {
			for e := range s.byParent.Group(index.Hash(parent.String())) {
				if e.ParentID == parent && !yield(e) {
					return
				}
			}
		}
	}
}

// now divides ids into what hangs below parents and what does not any more.
func (s *entries) now(parents []spiffeid.ID, ids map[string]struct{}) (changed []*entry.Entry, removed []string) {
	for id := range ids {
		if e := s.get(id); e != nil && slices.Contains(parents, e.ParentID) {
			changed = append(changed, e)
		} else {
			removed = append(removed, id)
		}
	}
	slices.SortFunc(changed, func(a, b *entry.Entry) int {
		return cmp.Or(cmp.Compare(a.Revision, b.Revision), strings.Compare(a.ID, b.ID))
	})
	slices.Sort(removed)
	return changed, removed
}

// mark notes a changed entry; f.mu is held.
func (f *Feed) mark(id string) {
	if f.reset {
		f.wake()
		return
	}
	f.pending[id] = struct{}{}
	if len(f.pending) > maxPending {
		f.relist()
		return
	}
	f.wake()
}

// relist makes the next Update a full listing; f.mu is held.
func (f *Feed) relist() {
	f.reset = true
	clear(f.pending)
	f.wake()
}

// behind says whether the stream has yet to be told of revision.
func (f *Feed) behind(revision uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.last < revision
}

// wake makes f due, and says whether it was not.
func (f *Feed) wake() bool {
	select {
	case f.signal <- struct{}{}:
		return true
	default:
		return false
	}
}

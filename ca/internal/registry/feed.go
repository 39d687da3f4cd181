// Feeds: what one Sync stream has yet to learn. A feed holds names, never
// contents, so changes that come faster than the stream sends fall together,
// and a stream that stands still holds up nobody and costs a bounded set of
// names.

package registry

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// maxPending is how many changed entries a feed remembers by name; beyond it
// the stream gets a full listing.
const maxPending = 10_000

// MaxFeeds is how many feeds one agent can have: one, and some that a broken
// connection has left behind. One more takes the place of the oldest.
const MaxFeeds = 4

// Ack is what an agent says that it serves.
type Ack struct {
	Revision, TrustBundleSequence, PolicyGeneration uint64
}

// AgentState is an agent with what its streams say.
type AgentState struct {
	*attest.Agent
	Connected bool
	Ack       Ack
	Acked     bool // whether Ack was ever said since the CA started
}

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
	signal   chan struct{}
	closing  chan struct{} // closed when a newer feed takes its place

	// Guarded by registry.mu.
	number  uint64 // of the order in which feeds were opened
	last    uint64 // the stream knows everything up to here
	reset   bool
	pending map[string]struct{} // entries changed since
	aliases []spiffeid.ID       // of the agent's node; not written to, but replaced

	// federated says which federated trust bundles the stream was told of; empty:
	// nothing yet. Of Take alone.
	federated string
}

// Subscribe opens a feed for the agent's node, beginning after resume, the
// revision up to which the agent holds everything. The feed is due at once.
// Close it.
//
// An agent may come from a replica that was ahead: Subscribe then waits for the
// picture, for a listing of an older state would take back what the agent
// knows. It fails only when ctx ends first. An agent from another epoch gets a
// full listing: what it holds may never have been here.
func (r *Registry) Subscribe(ctx context.Context, agent spiffeid.ID, resume uint64) (*Feed, error) {
	if store.Epoch(resume) == store.Epoch(r.Revision()) {
		if err := r.Wait(ctx, resume); err != nil {
			return nil, fmt.Errorf("wait for revision %d, at which the agent is: %w", resume, err)
		}
	}
	known := resume != 0 && r.knowHistory(ctx, resume)
	f := &Feed{registry: r, agent: agent, signal: make(chan struct{}, 1), closing: make(chan struct{}), last: resume, pending: make(map[string]struct{})}
	r.mu.Lock()
	if r.feeds[agent] == nil {
		r.feeds[agent] = make(map[*Feed]struct{})
	}
	r.opened++
	f.number = r.opened
	r.feeds[agent][f] = struct{}{}
	r.supersede(agent)
	pic := r.pic.Load()
	f.aliasesAnew(pic)
	parents := f.parents()
	gone := r.history.after(resume)
	if !known || resume < r.history.known || store.Epoch(resume) != store.Epoch(pic.revision) || pic.aliasesChanged(agent, resume, gone) {
		f.relist()
	}
	r.mu.Unlock()
	f.catchUp(pic, parents, gone)
	f.wake()
	return f, nil
}

// supersede closes the agent's oldest feed, if it has too many. r.mu is held.
func (r *Registry) supersede(agent spiffeid.ID) {
	feeds := r.feeds[agent]
	if len(feeds) <= MaxFeeds {
		return
	}
	var oldest *Feed
	for f := range feeds {
		if oldest == nil || f.number < oldest.number {
			oldest = f
		}
	}
	delete(feeds, oldest)
	oldest.leaveAliases()
	close(oldest.closing)
}

// catchUp marks what changed for f's node after f.last, up to pic; later
// changes are marked as they come.
func (f *Feed) catchUp(pic *picture, parents []spiffeid.ID, gone []removal) {
	r := f.registry
	r.mu.Lock()
	since, reset := f.last, f.reset
	r.mu.Unlock()
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
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range changed {
		f.mark(id)
	}
}

// Close ends the feed.
func (f *Feed) Close() {
	r := f.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.feeds[f.agent], f)
	if len(r.feeds[f.agent]) == 0 {
		delete(r.feeds, f.agent)
	}
	f.leaveAliases()
}

// parents are whose entries concern the node. registry.mu is held.
func (f *Feed) parents() []spiffeid.ID { return append([]spiffeid.ID{f.agent}, f.aliases...) }

// Superseded is closed when a newer feed of the agent has taken f's place.
func (f *Feed) Superseded() <-chan struct{} { return f.closing }

// Due receives when there is something to take.
func (f *Feed) Due() <-chan struct{} { return f.signal }

// Ack notes what the agent serves.
func (f *Feed) Ack(a Ack) {
	f.registry.mu.Lock()
	defer f.registry.mu.Unlock()
	f.registry.acks[f.agent] = a
}

// Acked is what the agent said last that it serves, on any stream.
func (f *Feed) Acked() (Ack, bool) {
	f.registry.mu.Lock()
	defer f.registry.mu.Unlock()
	ack, ok := f.registry.acks[f.agent]
	return ack, ok
}

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
	r := f.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	pic, parents, since, reset = r.pic.Load(), f.parents(), f.last, f.reset
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

// mark notes a changed entry; registry.mu is held.
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

// relist makes the next Update a full listing; registry.mu is held.
func (f *Feed) relist() {
	f.reset = true
	clear(f.pending)
	f.wake()
}

func (f *Feed) wake() {
	select {
	case f.signal <- struct{}{}:
	default: // it is awake already
	}
}

// Agents returns every agent, ordered by ID.
func (r *Registry) Agents() []AgentState {
	pic := r.pic.Load()
	states := make([]AgentState, 0, pic.agents.Len())
	r.mu.Lock()
	for _, a := range pic.agents.All() {
		states = append(states, r.state(a))
	}
	r.mu.Unlock()
	slices.SortFunc(states, func(a, b AgentState) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return states
}

// AgentState returns the agent with the given ID.
func (r *Registry) AgentState(id spiffeid.ID) (AgentState, bool) {
	a := r.pic.Load().agent(id)
	if a == nil {
		return AgentState{}, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state(a), true
}

// state is a with what its streams say. r.mu is held.
func (r *Registry) state(a *attest.Agent) AgentState {
	ack, acked := r.acks[a.ID]
	return AgentState{Agent: a, Connected: len(r.feeds[a.ID]) > 0, Ack: ack, Acked: acked}
}

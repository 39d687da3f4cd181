// Feeds: what one Sync stream has yet to learn. A feed holds names, never
// contents, so changes that come faster than the stream sends fall together,
// and a stream that stands still holds up nobody and costs a bounded set of
// names.

package registry

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/trust"
)

// maxPending is how many changed entries a feed remembers by name; beyond it
// the stream gets a full listing.
const maxPending = 10_000

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
}

// Feed belongs to one Sync stream.
type Feed struct {
	registry *Registry
	agent    spiffeid.ID
	signal   chan struct{}

	// Guarded by registry.mu.
	last    uint64 // the stream knows everything up to here
	reset   bool
	pending map[string]struct{} // entries changed since
}

// Subscribe opens a feed for the agent's node, beginning after resume, the
// revision up to which the agent holds everything. The feed is due at once.
// Close it.
func (r *Registry) Subscribe(ctx context.Context, agent spiffeid.ID, resume uint64) *Feed {
	historyKnown := resume != 0 && r.knowHistory(ctx, resume)
	f := &Feed{registry: r, agent: agent, signal: make(chan struct{}, 1), last: resume, pending: make(map[string]struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	// An agent that is ahead of the store has seen a future that is lost (an
	// older backup was restored): what it holds cannot be resumed from.
	if !historyKnown || resume > r.pic.revision || resume < r.history.known {
		f.relist()
	} else {
		r.catchUp(f)
	}
	r.feeds[f] = struct{}{}
	r.pic.node(agent).feeds[f] = struct{}{}
	f.wake()
	return f
}

// catchUp marks what changed for f's node after f.last.
func (r *Registry) catchUp(f *Feed) {
	for id, e := range r.pic.node(f.agent).entries {
		if e.Revision > f.last {
			f.mark(id)
		}
	}
	for _, gone := range r.history.after(f.last) {
		if gone.parent == f.agent {
			f.mark(gone.id)
		}
	}
}

// Close ends the feed.
func (f *Feed) Close() {
	f.registry.mu.Lock()
	defer f.registry.mu.Unlock()
	delete(f.registry.feeds, f)
	delete(f.registry.pic.node(f.agent).feeds, f)
	f.registry.pic.tidy(f.agent)
}

// Due receives when there is something to take.
func (f *Feed) Due() <-chan struct{} { return f.signal }

// Ack notes what the agent serves.
func (f *Feed) Ack(a Ack) {
	f.registry.mu.Lock()
	defer f.registry.mu.Unlock()
	f.registry.acks[f.agent] = a
}

// Take returns what the stream must be told to be at the current revision; the
// next Take begins there.
func (f *Feed) Take(now time.Time) Update {
	r := f.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	u := Update{Revision: r.pic.revision, Reset: f.reset}
	since := f.last
	if f.reset {
		since = 0
		u.Entries = sortedEntries(r.pic.node(f.agent).entries)
	} else {
		u.Entries, u.Removed = f.takePending()
	}
	u.Revocations = r.pic.revocations.After(since, now)
	if r.pic.trust != nil && r.pic.trust.Revision > since {
		u.Trust = r.pic.trust
	}
	for _, h := range r.pic.heads {
		if max(h.Revision, r.pic.replicas.keysAt) > since {
			u.Heads = append(u.Heads, h)
		}
	}
	slices.SortFunc(u.Heads, func(a, b *release.Head) int { return strings.Compare(a.Name, b.Name) })
	f.last, f.reset = u.Revision, false
	clear(f.pending)
	return u
}

func (f *Feed) takePending() (changed []*entry.Entry, removed []string) {
	held := f.registry.pic.node(f.agent).entries
	for id := range f.pending {
		if e := held[id]; e != nil {
			changed = append(changed, e)
		} else {
			removed = append(removed, id)
		}
	}
	slices.SortFunc(changed, func(a, b *entry.Entry) int { return cmp.Compare(a.Revision, b.Revision) })
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

// Agents returns every live agent, ordered by ID.
func (r *Registry) Agents() []AgentState {
	r.mu.RLock()
	defer r.mu.RUnlock()
	states := make([]AgentState, 0, len(r.pic.agents))
	for id, a := range r.pic.agents {
		ack, acked := r.acks[id]
		n := r.pic.nodes[id]
		states = append(states, AgentState{Agent: a, Connected: n != nil && len(n.feeds) > 0, Ack: ack, Acked: acked})
	}
	slices.SortFunc(states, func(a, b AgentState) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return states
}

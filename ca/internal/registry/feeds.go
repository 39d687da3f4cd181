// The open feeds: who is subscribed, and whom a change concerns. A new picture
// waits for nobody but those few, and for them only until a Take in progress has
// seen which picture it is of.

package registry

import (
	"context"
	"fmt"
	"iter"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
)

// MaxFeeds is how many feeds one agent can have: one, and some that a broken
// connection has left behind. One more takes the place of the oldest.
const MaxFeeds = 4

// feeds are all that are open. While mu is held none comes or goes, and the
// picture is not replaced. It is taken before the mu of any feed; streams do not
// take it but to begin and to end.
type feeds struct {
	mu sync.Mutex
	// guarded by mu
	byAgent map[spiffeid.ID]map[*Feed]struct{}
	byAlias map[spiffeid.ID]map[*Feed]struct{} // of their nodes
	opened  uint64                             // ever
}

func newFeeds() feeds {
	return feeds{byAgent: make(map[spiffeid.ID]map[*Feed]struct{}), byAlias: make(map[spiffeid.ID]map[*Feed]struct{})}
}

// open are all feeds, in no order.
func (s *feeds) open() []*Feed {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all()
}

// all is open where mu is held.
func (s *feeds) all() []*Feed {
	all := make([]*Feed, 0, len(s.byAgent))
	for _, of := range s.byAgent {
		for f := range of {
			all = append(all, f)
		}
	}
	return all
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
	pic, parents, gone := f.join(known)
	f.catchUp(pic, parents, gone)
	f.wake()
	return f, nil
}

// join makes f one of the feeds, as of the picture that it returns with whose
// entries concern f and what was removed since; what comes later is marked.
func (f *Feed) join(known bool) (*picture, []spiffeid.ID, []removal) {
	r, s := f.registry, &f.registry.feeds
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened++
	f.number = s.opened
	if s.byAgent[f.agent] == nil {
		s.byAgent[f.agent] = make(map[*Feed]struct{})
	}
	s.byAgent[f.agent][f] = struct{}{}
	s.supersede(f.agent)
	pic := r.pic.Load()
	gone, knownSince := r.removals(f.last)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aliasesAnew(pic)
	if !known || f.last < knownSince || store.Epoch(f.last) != store.Epoch(pic.revision) || pic.aliasesChanged(f.agent, f.last, gone) {
		f.relist()
	}
	return pic, f.parents(), gone
}

// supersede closes the agent's oldest feed, if it has too many. s.mu is held.
func (s *feeds) supersede(agent spiffeid.ID) {
	of := s.byAgent[agent]
	if len(of) <= MaxFeeds {
		return
	}
	var oldest *Feed
	for f := range of {
		if oldest == nil || f.number < oldest.number {
			oldest = f
		}
	}
	s.drop(oldest)
	close(oldest.closing)
}

// Close ends the feed.
func (f *Feed) Close() {
	s := &f.registry.feeds
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(f)
}

// drop forgets f. s.mu is held.
func (s *feeds) drop(f *Feed) {
	delete(s.byAgent[f.agent], f)
	if len(s.byAgent[f.agent]) == 0 {
		delete(s.byAgent, f.agent)
	}
	for _, alias := range f.aliases {
		s.list(f, alias, false)
	}
}

// list notes whom a change below the alias concerns. s.mu is held.
func (s *feeds) list(f *Feed, alias spiffeid.ID, has bool) {
	if !has {
		delete(s.byAlias[alias], f)
		if len(s.byAlias[alias]) == 0 {
			delete(s.byAlias, alias)
		}
		return
	}
	if s.byAlias[alias] == nil {
		s.byAlias[alias] = make(map[*Feed]struct{})
	}
	s.byAlias[alias][f] = struct{}{}
}

// below are the feeds that a change of the node's entries concerns: of an agent,
// or of the agents whose nodes have that alias. s.mu is held.
func (s *feeds) below(node spiffeid.ID) iter.Seq[*Feed] {
	return func(yield func(*Feed) bool) {
		for _, of := range []map[*Feed]struct{}{s.byAgent[node], s.byAlias[node]} {
			for f := range of {
				if !yield(f) {
					return
				}
			}
		}
	}
}

// concerned are the feeds that c marks something for, or gives other aliases. s.mu
// is held.
func (s *feeds) concerned(c change, turns []turn) map[*Feed]struct{} {
	found := make(map[*Feed]struct{})
	for _, t := range c.touched {
		for f := range s.below(t.node) {
			found[f] = struct{}{}
		}
	}
	for _, t := range turns {
		found[t.feed] = struct{}{}
	}
	return found
}

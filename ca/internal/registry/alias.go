// Aliases of nodes: an entry of the CA stands for each agent with its selectors,
// and what hangs below the alias concerns them all. Which aliases a stream's node
// has is kept with the stream, so that a change costs those whom it concerns.

package registry

import (
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
)

// aliases are those of the agent's node.
func (p *picture) aliases(agent spiffeid.ID) []spiffeid.ID {
	a := p.agent(agent)
	if a == nil || len(a.Selectors) == 0 {
		return nil
	}
	var ids []spiffeid.ID
	for e := range p.entries.below(entry.CAID(agent.TrustDomain())) {
		if e.StandsFor(a.Selectors) && !slices.Contains(ids, e.SPIFFEID) {
			ids = append(ids, e.SPIFFEID)
		}
	}
	return ids
}

// standsFor says whether the alias is one of a's node at now; a may be nil.
func (p *picture) standsFor(alias spiffeid.ID, a *attest.Agent, now time.Time) bool {
	for e := range named(p.entries.bySPIFFEID, alias, now) {
		if a != nil && e.StandsFor(a.Selectors) {
			return true
		}
	}
	return false
}

// always is before the end of every entry: an alias whose entry has expired goes
// when that is removed, as workloads' entries do, but is good for nothing before.
var always time.Time

// Concerns says whether e, which may be nil, concerns the node of the agent at
// now: its parent is the agent, or an alias of the node.
func (g *Grounds) Concerns(e *entry.Entry, now time.Time) bool {
	if e == nil || g.Agent == nil {
		return false
	}
	if e.ParentID == g.Agent.ID {
		return true
	}
	return entry.IsAlias(e.ParentID) && g.pic.standsFor(e.ParentID, g.Agent, now)
}

// Count is how many entries concern the node of the agent, which must be there. It
// goes over all of them.
func (g *Grounds) Count() (n int) {
	for range g.pic.entries.below(append(g.pic.aliases(g.Agent.ID), g.Agent.ID)...) {
		n++
	}
	return n
}

// turn is a feed whose node gets the alias, or does not have it any more.
type turn struct {
	feed  *Feed
	alias spiffeid.ID
	has   bool
}

// turns are those that c makes, pic being the picture after it. s.mu is held.
func (s *feeds) turns(pic *picture, c change) (turns []turn) {
	look := func(f *Feed, alias spiffeid.ID, has bool) {
		if has != slices.Contains(f.aliases, alias) {
			turns = append(turns, turn{f, alias, has})
		}
	}
	if len(c.aliases) > 0 {
		for _, f := range s.all() {
			a := pic.agent(f.agent)
			for _, alias := range c.aliases {
				look(f, alias, pic.standsFor(alias, a, always))
			}
		}
	}
	for _, agent := range c.renewed {
		now := pic.aliases(agent)
		for f := range s.byAgent[agent] {
			for _, alias := range slices.Concat(now, f.aliases) {
				look(f, alias, slices.Contains(now, alias))
			}
		}
	}
	return turns
}

// take lets f's node have the alias or not, and marks what hangs below it, if that
// is news. feeds.mu and the feed's mu are held.
func (t turn) take(pic *picture) {
	f := t.feed
	if t.has == slices.Contains(f.aliases, t.alias) {
		return
	}
	if t.has {
		f.aliases = append(slices.Clone(f.aliases), t.alias)
	} else {
		f.aliases = slices.DeleteFunc(slices.Clone(f.aliases), func(id spiffeid.ID) bool { return id == t.alias })
	}
	f.registry.feeds.list(f, t.alias, t.has)
	for e := range pic.entries.below(t.alias) {
		f.mark(e.ID)
	}
}

// aliasesAnew gives f the aliases that its node has in pic; what it knows is
// listed anew by the caller. feeds.mu and f.mu are held.
func (f *Feed) aliasesAnew(pic *picture) {
	s := &f.registry.feeds
	for _, alias := range f.aliases {
		s.list(f, alias, false)
	}
	f.aliases = pic.aliases(f.agent)
	for _, alias := range f.aliases {
		s.list(f, alias, true)
	}
}

// aliasesChanged says whether the node may have got or lost an alias after the
// revision since, gone being what was removed after it.
func (p *picture) aliasesChanged(agent spiffeid.ID, since uint64, gone []removal) bool {
	a := p.agent(agent)
	switch {
	case a == nil:
		return false
	case a.AttestedRevision > since:
		return true
	case len(a.Selectors) == 0:
		return false
	}
	ca := entry.CAID(agent.TrustDomain())
	for e := range p.entries.below(ca) {
		if e.Revision > since {
			return true
		}
	}
	return slices.ContainsFunc(gone, func(g removal) bool { return g.parent == ca })
}

// Mark sets those of asked that the entries give which concern the node of agent. It goes
// over these entries until none is left to be found.
func (r *Registry) Mark(agent spiffeid.ID, asked map[string]bool) {
	if len(asked) == 0 {
		return
	}
	pic, left := r.pic.Load(), len(asked)
	for e := range pic.entries.below(append([]spiffeid.ID{agent}, pic.aliases(agent)...)...) {
		if given, ok := asked[e.SPIFFEID.String()]; ok && !given {
			asked[e.SPIFFEID.String()] = true
			if left--; left == 0 {
				return
			}
		}
	}
}

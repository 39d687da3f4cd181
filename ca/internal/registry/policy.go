// What the picture says of policy bundles: their heads, and what replicas know of how
// they fare.

package registry

import (
	"maps"
	"slices"
	"strings"

	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/rollout"
)

// PolicyHead is the head of the named policy bundle.
func (r *Registry) PolicyHead(name string) (*release.Head, bool) {
	h, ok := r.pic.Load().heads[name]
	return h, ok
}

// PolicyHeads are those of all policy bundles, by name.
func (r *Registry) PolicyHeads() []*release.Head {
	return slices.SortedFunc(maps.Values(r.pic.Load().heads), func(a, b *release.Head) int { return strings.Compare(a.Name, b.Name) })
}

// PolicyShares is what replicas wrote down of the named bundle: this one, which may be
// nil, and the others. Of those that are not heard of any more, silent holds the names.
func (r *Registry) PolicyShares(name, self string) (own *rollout.Share, others []*rollout.Share, silent []string) {
	pic := r.pic.Load()
	for _, s := range pic.shares {
		switch {
		case s.Bundle != name:
		case s.Replica == self:
			own = s
		default:
			others = append(others, s)
		}
	}
	return own, others, pic.replicas.unheard(self)
}

// HeadsChanged returns a channel that is closed when any policy bundle gets a
// new generation, or a replica came or went, and with it the keys that sign.
func (r *Registry) HeadsChanged() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.heads
}

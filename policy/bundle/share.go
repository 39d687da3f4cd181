package bundle

// This file takes the share of some destinations out of a policy: an agent gets the
// grants of the services on its node, and not everybody's.

import (
	"slices"

	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
)

// Shares is a policy whose grants are found by destination. It never changes and is
// safe for concurrent use.
type Shares struct {
	contents *Contents
	exact    map[string][]int // places in contents.Grants, by SPIFFE ID
	other    []int            // of those with a pattern, or for any destination
	whole    bool             // own Rego reads grants: every share has all of them
}

// NewShares prepares c, which must not change afterwards.
func NewShares(c *Contents) *Shares {
	s := &Shares{contents: c, exact: map[string][]int{}, whole: engine.ReadsGrants(c.Modules)}
	for i := range c.Grants {
		if wide(&c.Grants[i]) {
			s.other = append(s.other, i)
			continue
		}
		for _, to := range c.Grants[i].To {
			s.exact[to] = append(s.exact[to], i)
		}
	}
	return s
}

// wide says whether g names destinations by more than single SPIFFE IDs.
func wide(g *grant.Grant) bool {
	return g.To == nil || slices.ContainsFunc(g.To, func(to string) bool { return !grant.IsSingle(to) })
}

// Of is an unsigned bundle with the grants that can decide calls to destinations,
// and all Rego of the policy's own. For these destinations it decides as the whole
// does; sign it with them as its audience. Equal shares are equal bytes.
func (s *Shares) Of(destinations []string) ([]byte, error) {
	if s.whole {
		return unsigned(s.contents)
	}
	var places []int
	for _, d := range destinations {
		places = append(places, s.exact[d]...)
	}
	for _, i := range s.other {
		if g := &s.contents.Grants[i]; g.To == nil || slices.ContainsFunc(destinations, func(d string) bool { return covers(g, d) }) {
			places = append(places, i)
		}
	}
	slices.Sort(places)
	share := &Contents{Modules: s.contents.Modules}
	for _, i := range slices.Compact(places) {
		share.Grants = append(share.Grants, s.contents.Grants[i])
	}
	return unsigned(share)
}

func covers(g *grant.Grant, destination string) bool {
	return slices.ContainsFunc(g.To, func(to string) bool { return grant.MatchSPIFFEID(to, destination) })
}

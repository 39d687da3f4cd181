package diff

// This file orders patterns for SPIFFE IDs. Any two are apart or one is within the
// other, so they are a tree; what a policy says is the same for all IDs that have the
// same place in it.

import (
	"slices"
	"strings"

	"merlon.dev/policy/grant"
)

// anyID stands for every ID among patterns.
const anyID = "*"

// place is a node of the tree: the IDs that pattern matches and no child does.
type place struct {
	pattern  string
	parent   *place // nil for anyID
	children []*place
}

// tree returns the places of patterns, parents first. A nil list means any ID.
func tree(lists ...[]string) []*place {
	named := map[string]bool{anyID: true}
	for _, list := range lists {
		for _, pattern := range list {
			named[pattern] = true
		}
	}
	byPattern := make(map[string]*place, len(named))
	places := make([]*place, 0, len(named))
	for pattern := range named {
		at := &place{pattern: pattern}
		byPattern[pattern] = at
		places = append(places, at)
	}
	slices.SortFunc(places, func(a, b *place) int { return strings.Compare(a.pattern, b.pattern) })
	for _, at := range places {
		for _, outer := range around(at.pattern) {
			if at.parent = byPattern[outer]; at.parent != nil {
				at.parent.children = append(at.parent.children, at)
				break
			}
		}
	}
	return walk(nil, byPattern[anyID])
}

func walk(list []*place, at *place) []*place {
	list = append(list, at)
	for _, child := range at.children {
		list = walk(list, child)
	}
	return list
}

// around are the patterns that pattern could be within, the nearest first.
func around(pattern string) (outer []string) {
	if pattern == anyID {
		return nil
	}
	const scheme = "spiffe://"
	base := strings.TrimSuffix(pattern, "/*")
	for {
		i := strings.LastIndexByte(base, '/')
		if i < len(scheme) {
			break
		}
		base = base[:i]
		outer = append(outer, base+"/*")
	}
	if pattern != base { // the trust domain has its own ID, which is below nothing
		outer = append(outer, base)
	}
	return append(outer, anyID)
}

// covering are the grants whose list of patterns covers at.
func covering(at *place, byPattern map[string][]*grant.Grant) (grants []*grant.Grant) {
	for ; at != nil; at = at.parent {
		grants = append(grants, byPattern[at.pattern]...)
	}
	return unique(grants)
}

// unique sorts by ID and removes what is there twice.
func unique(grants []*grant.Grant) []*grant.Grant {
	slices.SortFunc(grants, func(a, b *grant.Grant) int { return strings.Compare(a.ID, b.ID) })
	return slices.Compact(grants)
}

func matchesID(pattern, id string) bool {
	return pattern == anyID || grant.MatchSPIFFEID(pattern, id)
}

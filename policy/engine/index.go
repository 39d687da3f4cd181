package engine

// This file finds the grants for a call: the leaves of the compiled index
// under every key that its source and destination can stand under. Module
// does the same in Rego, for other OPAs; here it is hash lookups.

import (
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// leaf has the grants of one key, compiled by build.
type leaf struct {
	grants              []*grant.Grant
	once                sync.Once
	deny, allow, dryRun entries // valid after build
}

// entries are the grants of one kind.
type entries struct {
	list []entry
	all  *ast.Term // the array of them, if none expires
}

// entry is a compiled grant, in term as a syntax tree value, which evaluations
// share.
type entry struct {
	id      string
	term    *ast.Term
	expires int64 // Unix time in nanoseconds; never: does not
}

const never = math.MaxInt64

// found has the grants for one call, arrays in the order of their IDs; nil
// where there are none.
type found struct{ deny, allow, dryRun *ast.Term }

// index has the grants by to, from and protocol, as grant.Compile keys them.
type index struct {
	leaves               map[leafKey]*leaf
	toDepths, fromDepths []int
}

// leafKey has patterns as written, or "*" for any.
type leafKey struct {
	to, from string
	protocol policy.Protocol
}

// newIndex is for grants that are sorted by ID and that nobody changes afterwards.
func newIndex(grants []grant.Grant) index {
	x := index{leaves: map[leafKey]*leaf{}}
	for i := range grants {
		g := &grants[i]
		for _, to := range orAny(g.To) {
			x.toDepths = addDepth(x.toDepths, to)
			for _, from := range orAny(g.From) {
				x.fromDepths = addDepth(x.fromDepths, from)
				key := leafKey{to, from, g.Protocol()}
				if x.leaves[key] == nil {
					x.leaves[key] = new(leaf)
				}
				x.leaves[key].grants = append(x.leaves[key].grants, g)
			}
		}
	}
	return x
}

func orAny(patterns []string) []string {
	if patterns == nil {
		return []string{"*"}
	}
	return patterns
}

// build compiles the grants of l, when the first call needs them: where programs
// decide that is never.
func (l *leaf) build() {
	l.once.Do(func() {
		for _, g := range l.grants {
			into := &l.allow
			switch {
			case g.Mode == grant.DryRun:
				into = &l.dryRun
			case g.Effect == grant.Deny:
				into = &l.deny
			}
			into.list = append(into.list, newEntry(g))
		}
		for _, e := range []*entries{&l.deny, &l.allow, &l.dryRun} {
			if !slices.ContainsFunc(e.list, func(e entry) bool { return e.expires != never }) {
				e.all = arrayOf(e.list, 0)
			}
		}
	})
}

func newEntry(g *grant.Grant) entry {
	e := entry{id: g.ID, term: ast.NewTerm(ast.MustInterfaceToValue(g.Compiled())), expires: never}
	if g.Expires != nil {
		e.expires = grant.UnixNano(*g.Expires)
	}
	return e
}

// addDepth notes how many slashes a "…/*" key has before its "*".
func addDepth(depths []int, key string) []int {
	base, ok := strings.CutSuffix(key, "*")
	if n := strings.Count(base, "/"); ok && n > 0 && !slices.Contains(depths, n) {
		return append(depths, n)
	}
	return depths
}

// lookup finds the grants for in that have not expired at now.
func (x *index) lookup(in *policy.Input, now time.Time) (f found) {
	to, from := make([]string, 0, 8), make([]string, 0, 8)
	to, from = candidates(to, in.Destination, x.toDepths), candidates(from, in.Source, x.fromDepths)
	hits := make([]*leaf, 0, 8)
	for _, t := range to {
		for _, s := range from {
			if l := x.leaves[leafKey{t, s, in.Protocol}]; l != nil {
				l.build()
				hits = append(hits, l)
			}
		}
	}
	at := now.UnixNano()
	f.deny = live(hits, func(l *leaf) *entries { return &l.deny }, at)
	f.allow = live(hits, func(l *leaf) *entries { return &l.allow }, at)
	f.dryRun = live(hits, func(l *leaf) *entries { return &l.dryRun }, at)
	return f
}

// live has the grants of one kind in leaves that have not expired.
func live(leaves []*leaf, of func(*leaf) *entries, at int64) *ast.Term {
	var only *entries
	var several []entry
	for _, l := range leaves {
		switch found := of(l); {
		case len(found.list) == 0:
		case only == nil:
			only = found
		default:
			if several == nil {
				several = slices.Clone(only.list)
			}
			several = append(several, found.list...)
		}
	}
	switch {
	case only == nil:
		return nil
	case several != nil:
		slices.SortFunc(several, func(a, b entry) int { return strings.Compare(a.id, b.id) })
		return arrayOf(several, at)
	case only.all != nil:
		return only.all
	}
	return arrayOf(only.list, at)
}

// arrayOf has the grants of list that are live; nil for none.
func arrayOf(list []entry, at int64) *ast.Term {
	var terms []*ast.Term
	for i := range list {
		if end := list[i].expires; end == never || at < end {
			terms = append(terms, list[i].term)
		}
	}
	if terms == nil {
		return nil
	}
	return ast.ArrayTerm(terms...)
}

// candidates appends the index keys that id can stand under: itself, its
// trust domain, any, and "…/*" for each depth at which there are such keys.
func candidates(keys []string, id string, depths []int) []string {
	keys = append(keys, id, "*")
	slashes := 0
	for i := range len(id) {
		if id[i] != '/' {
			continue
		}
		slashes++
		if slashes == 3 {
			keys = append(keys, id[:i])
		}
		if slashes > 2 && i+1 < len(id) && slices.Contains(depths, slashes) {
			keys = append(keys, id[:i+1]+"*")
		}
	}
	return keys
}

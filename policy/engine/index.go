package engine

// This file finds the grants for a call: the leaves of the compiled index
// under every key that its source and destination can stand under. Module
// does the same in Rego, for other OPAs; here it is hash lookups.

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
)

// leaf has the compiled grants of one key.
type leaf struct{ deny, allow, dryRun entries }

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

// index is the "index" of grant.Compile, by to, from and protocol.
type index struct {
	leaves               map[string]map[string]map[policy.Protocol]*leaf
	toDepths, fromDepths []int
}

func newIndex(data map[string]any) (index, error) {
	x := index{leaves: map[string]map[string]map[policy.Protocol]*leaf{}}
	byTo, _ := data["index"].(map[string]any)
	for to, v := range byTo {
		byFrom, _ := v.(map[string]any)
		x.leaves[to] = make(map[string]map[policy.Protocol]*leaf, len(byFrom))
		x.toDepths = addDepth(x.toDepths, to)
		for from, v := range byFrom {
			byProtocol, _ := v.(map[string]any)
			x.leaves[to][from] = make(map[policy.Protocol]*leaf, len(byProtocol))
			x.fromDepths = addDepth(x.fromDepths, from)
			for protocol, v := range byProtocol {
				l, err := newLeaf(v)
				if err != nil {
					return index{}, fmt.Errorf("load policy: %v", err)
				}
				x.leaves[to][from][policy.Protocol(protocol)] = l
			}
		}
	}
	return x, nil
}

func newLeaf(v any) (*leaf, error) {
	kinds, _ := v.(map[string]any)
	var l leaf
	for kind, into := range map[string]*entries{"deny": &l.deny, "allow": &l.allow, "dry_run": &l.dryRun} {
		grants, _ := kinds[kind].([]any)
		for _, g := range grants {
			e, err := newEntry(g)
			if err != nil {
				return nil, err
			}
			into.list = append(into.list, e)
		}
		if !slices.ContainsFunc(into.list, func(e entry) bool { return e.expires != never }) {
			into.all = arrayOf(into.list, 0)
		}
	}
	return &l, nil
}

func newEntry(g any) (e entry, err error) {
	value, err := ast.InterfaceToValue(g)
	if err != nil {
		return entry{}, err
	}
	e.term, e.expires = ast.NewTerm(value), never
	fields, _ := g.(map[string]any)
	e.id, _ = fields["id"].(string)
	if end, ok := fields["expires_ns"].(json.Number); ok {
		e.expires, err = end.Int64()
	}
	return e, err
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
		byFrom := x.leaves[t]
		if byFrom == nil {
			continue
		}
		for _, s := range from {
			if l := byFrom[s][in.Protocol]; l != nil {
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

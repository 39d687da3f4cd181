package engine

// This file finds the grants for a call: the leaves of the compiled index
// under every key that its source and destination can stand under. Module
// does the same in Rego, for other OPAs; here it is hash lookups.

import (
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
)

// leaf has the compiled grants of one key, as syntax tree values, which
// evaluations share.
type leaf struct{ deny, allow, dryRun []*ast.Term }

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
	for kind, terms := range map[string]*[]*ast.Term{"deny": &l.deny, "allow": &l.allow, "dry_run": &l.dryRun} {
		grants, _ := kinds[kind].([]any)
		for _, g := range grants {
			value, err := ast.InterfaceToValue(g)
			if err != nil {
				return nil, err
			}
			*terms = append(*terms, ast.NewTerm(value))
		}
	}
	return &l, nil
}

// addDepth notes how many slashes a "…/*" key has before its "*".
func addDepth(depths []int, key string) []int {
	base, ok := strings.CutSuffix(key, "*")
	if n := strings.Count(base, "/"); ok && n > 0 && !slices.Contains(depths, n) {
		return append(depths, n)
	}
	return depths
}

func (x *index) lookup(in *policy.Input) (found leaf) {
	to, from := make([]string, 0, 8), make([]string, 0, 8)
	to, from = candidates(to, in.Destination, x.toDepths), candidates(from, in.Source, x.fromDepths)
	for _, t := range to {
		byFrom := x.leaves[t]
		if byFrom == nil {
			continue
		}
		for _, f := range from {
			if l := byFrom[f][in.Protocol]; l != nil {
				found.deny = append(found.deny, l.deny...)
				found.allow = append(found.allow, l.allow...)
				found.dryRun = append(found.dryRun, l.dryRun...)
			}
		}
	}
	return found
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

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

// index is the "index" and "depths" of grant.Compile, with its leaves as
// syntax tree values, which evaluations share.
type index struct {
	leaves               map[string]map[string]map[policy.Protocol]*ast.Term // to, from
	toDepths, fromDepths []int
}

func newIndex(data map[string]any) (index, error) {
	x := index{leaves: map[string]map[string]map[policy.Protocol]*ast.Term{}}
	byTo, _ := data["index"].(map[string]any)
	for to, v := range byTo {
		byFrom, _ := v.(map[string]any)
		x.leaves[to] = make(map[string]map[policy.Protocol]*ast.Term, len(byFrom))
		x.toDepths = addDepth(x.toDepths, to)
		for from, v := range byFrom {
			byProtocol, _ := v.(map[string]any)
			x.leaves[to][from] = make(map[policy.Protocol]*ast.Term, len(byProtocol))
			x.fromDepths = addDepth(x.fromDepths, from)
			for protocol, leaf := range byProtocol {
				value, err := ast.InterfaceToValue(leaf)
				if err != nil {
					return index{}, fmt.Errorf("load policy: %v", err)
				}
				x.leaves[to][from][policy.Protocol(protocol)] = ast.NewTerm(value)
			}
		}
	}
	return x, nil
}

// addDepth notes how many slashes a "…/*" key has before its "*".
func addDepth(depths []int, key string) []int {
	base, ok := strings.CutSuffix(key, "*")
	if n := strings.Count(base, "/"); ok && n > 0 && !slices.Contains(depths, n) {
		return append(depths, n)
	}
	return depths
}

func (x *index) lookup(in *policy.Input) []*ast.Term {
	var found []*ast.Term
	to, from := make([]string, 0, 8), make([]string, 0, 8)
	to, from = candidates(to, in.Destination, x.toDepths), candidates(from, in.Source, x.fromDepths)
	for _, t := range to {
		byFrom := x.leaves[t]
		if byFrom == nil {
			continue
		}
		for _, f := range from {
			if leaf := byFrom[f][in.Protocol]; leaf != nil {
				found = append(found, leaf)
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

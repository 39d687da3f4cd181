package residual

// This file finds which parts of a call a policy's own Rego can read, so that a
// decision may be kept for calls that agree in them. It takes the union of OPA's
// analysis and a walk of our own; each may only find too much.

import (
	"fmt"
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/dependencies"

	"merlon.dev/policy/kept"
)

// reads is kept.Reads as it is found.
type reads struct {
	kept.Reads
	headers map[string]bool
}

// part is a place of the input, and what of a call it holds.
type part struct {
	place ast.Ref
	take  func(*kept.Reads)
	named bool // its members are headers
}

var parts = []part{
	{ast.MustParseRef("input.attributes.request.http.path"), func(r *kept.Reads) { r.Query = true }, false},
	{ast.MustParseRef("input.parsed_query"), func(r *kept.Reads) { r.Query = true }, false},
	{ast.MustParseRef("input.attributes.request.http.host"), func(r *kept.Reads) { r.Host = true }, false},
	{ast.MustParseRef("input.attributes.request.http.headers"), func(r *kept.Reads) { r.AllHeaders = true }, true},
	{ast.MustParseRef("input.attributes.request.http.headers_all"), func(r *kept.Reads) { r.AllHeaders = true }, true},
	{ast.MustParseRef("input.attributes.source.address"), func(r *kept.Reads) { r.SourceAddress = true }, false},
	{ast.MustParseRef("input.attributes.destination.address"), func(r *kept.Reads) { r.DestinationAddress = true }, false},
}

// FindReads says what the policy that c has compiled can read, or why its answer
// may be another one for the same call.
func FindReads(c *ast.Compiler) (kept.Reads, error) {
	r := reads{headers: map[string]bool{}}
	var unsteady error
	for _, rule := range reachable(c) {
		ast.WalkRefs(rule, func(ref ast.Ref) bool {
			r.take(ref)
			if b := ast.BuiltinMap[ref.String()]; b != nil && b.Nondeterministic && unsteady == nil {
				unsteady = notNative(ref[0].Loc(), "%s gives another value each time", b.Name)
			}
			return false
		})
		if wholeInput(rule) != nil {
			r.everything()
		}
	}
	for _, path := range asked {
		refs, err := dependencies.Base(c, ast.MustParseRef(path))
		if err != nil {
			return kept.Reads{}, fmt.Errorf("what %s reads cannot be found: %v", path, err)
		}
		for _, ref := range refs {
			r.take(ref)
		}
	}
	r.Headers = slices.Sorted(maps.Keys(r.headers))
	return r.Reads, unsteady
}

func (r *reads) everything() {
	r.Reads = kept.Reads{Query: true, Host: true, SourceAddress: true, DestinationAddress: true, AllHeaders: true}
}

// take adds what ref can read.
func (r *reads) take(ref ast.Ref) {
	if !ref.HasPrefix(ast.InputRootRef) {
		return
	}
	ground := ref.GroundPrefix()
	for _, p := range parts {
		switch {
		case p.place.HasPrefix(ground): // all of something that it is in
			p.take(&r.Reads)
		case !ground.HasPrefix(p.place):
		default:
			if name, ok := ground[len(p.place)].Value.(ast.String); ok && p.named {
				r.headers[string(name)] = true
				continue
			}
			p.take(&r.Reads)
		}
	}
}

// NamesJWT says that and where the policy that c has compiled names "jwt", of which a
// call has as much as its token says, and as long; nil where it does not.
func NamesJWT(c *ast.Compiler) (found error) {
	for _, rule := range reachable(c) {
		ast.WalkTerms(rule, func(t *ast.Term) bool {
			if found == nil && ast.String("jwt").Equal(t.Value) {
				found = notNative(t.Loc(), "what input.jwt says ends with its token")
			}
			return found != nil
		})
	}
	return found
}

// Reading says of each of places of the input whether the policy that c has compiled
// can read it, or something in it.
func Reading(c *ast.Compiler, places []ast.Ref) ([]bool, error) {
	reads := make([]bool, len(places))
	take := func(ref ast.Ref) {
		if !ref.HasPrefix(ast.InputRootRef) {
			return
		}
		ground := ref.GroundPrefix()
		for i, place := range places {
			reads[i] = reads[i] || place.HasPrefix(ground) || ground.HasPrefix(place)
		}
	}
	for _, rule := range reachable(c) {
		ast.WalkRefs(rule, func(ref ast.Ref) bool { take(ref); return false })
		if wholeInput(rule) != nil {
			take(ast.InputRootRef)
		}
	}
	for _, path := range asked {
		refs, err := dependencies.Base(c, ast.MustParseRef(path))
		if err != nil {
			return nil, fmt.Errorf("what %s reads cannot be found: %v", path, err)
		}
		for _, ref := range refs {
			take(ref)
		}
	}
	return reads, nil
}

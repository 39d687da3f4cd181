// Package diff says which calls one policy allows and another does not. Of grants it
// says so exactly, as sets of calls; of a policy's own Rego by asking both about calls
// made of their own words.
package diff

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// Access is a set of calls: those from a source to a destination, by the protocol, with
// one of the methods and one of the paths, each but those that are excepted. Source and
// destination are patterns of grants, or "*" for any. A list that is nil means any.
type Access struct {
	Source            string          `json:"source"`
	SourceExcept      []string        `json:"source_except,omitempty"`
	Destination       string          `json:"destination"`
	DestinationExcept []string        `json:"destination_except,omitempty"`
	Protocol          policy.Protocol `json:"protocol"`
	Methods           []string        `json:"methods,omitempty"`
	MethodsExcept     []string        `json:"methods_except,omitempty"`
	Paths             []string        `json:"paths,omitempty"`
	PathsExcept       []string        `json:"paths_except,omitempty"`
	Services          []string        `json:"services,omitempty"` // of gRPC, in place of paths
	ServicesExcept    []string        `json:"services_except,omitempty"`
}

// Contains says whether the call in is one of a, as package grant compares calls. Its
// path is unambiguous (policy.CheckPath).
func (a *Access) Contains(in *policy.Input) bool {
	is := func(item, s string) bool { return item == s }
	if in.Protocol != a.Protocol || !among([]string{a.Source}, a.SourceExcept, in.Source, matchesID) ||
		!among([]string{a.Destination}, a.DestinationExcept, in.Destination, matchesID) {
		return false
	}
	switch in.Protocol {
	case policy.HTTP:
		return among(a.Methods, a.MethodsExcept, in.Method, is) && among(a.Paths, a.PathsExcept, in.Path, grant.MatchPath)
	case policy.GRPC:
		service, rpc, ok := policy.SplitRPC(in.Path)
		return ok && among(a.Methods, a.MethodsExcept, rpc, is) && among(a.Services, a.ServicesExcept, service, is)
	}
	return true
}

func among(items, except []string, s string, matches func(item, s string) bool) bool {
	match := func(item string) bool { return matches(item, s) }
	return (items == nil || slices.ContainsFunc(items, match)) && !slices.ContainsFunc(except, match)
}

// Difference is what two sets of grants allow differently.
type Difference struct {
	// Added are the calls that the second allows and the first denies; Removed the
	// other way round. No call is in both.
	Added, Removed []Access
	// Notes are about changes that change no answer now.
	Notes []string
}

// Grants compares what grants allow at now. Dry-run grants and those that have ended
// allow nothing. The error is about patterns that overlap too much.
func Grants(a, b []grant.Grant, now time.Time) (*Difference, error) {
	d := &Difference{Notes: notes(a, b, now)}
	c := comparison{
		paths: newPaths(), a: inForce(a, now), b: inForce(b, now),
		meanings: map[*grant.Grant]string{}, covers: map[*grant.Grant]set{},
	}
	var err error
	if d.Added, d.Removed, err = c.destinations(); err != nil {
		return nil, err
	}
	return d, nil
}

func inForce(grants []grant.Grant, now time.Time) (list []*grant.Grant) {
	for i := range grants {
		if g := &grants[i]; g.Mode != grant.DryRun && !g.Expired(now) {
			list = append(list, g)
		}
	}
	return list
}

// notes says which grants changed in what decides nothing now.
func notes(a, b []grant.Grant, now time.Time) (words []string) {
	note := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	before := make(map[string]*grant.Grant, len(a))
	for i := range a {
		before[a[i].ID] = &a[i]
	}
	for i := range b {
		g := &b[i]
		old := before[g.ID]
		delete(before, g.ID)
		switch {
		case old == nil && g.Mode == grant.DryRun:
			note("grant %s is new, in mode dry-run: it decides nothing", g.ID)
		case old == nil && g.Expired(now):
			note("grant %s is new, and ended at %s", g.ID, until(g))
		case old == nil:
		case old.Mode != g.Mode && (old.Mode == grant.DryRun || g.Mode == grant.DryRun):
			note("grant %s goes from %s to %s", g.ID, mode(old), mode(g))
		case until(old) != until(g):
			note("grant %s ends at %s, before: %s", g.ID, until(g), until(old))
		case g.Mode == grant.DryRun && meaning(old)+strings.Join(old.To, ",") != meaning(g)+strings.Join(g.To, ","):
			note("grant %s changes, in mode dry-run: it decides nothing", g.ID)
		}
	}
	for i := range a {
		if g := &a[i]; before[g.ID] != nil && g.Mode == grant.DryRun {
			note("grant %s is gone, of mode dry-run: it decided nothing", g.ID)
		}
	}
	return words
}

func mode(g *grant.Grant) grant.Mode { return cmp.Or(g.Mode, grant.Enforce) }

func until(g *grant.Grant) string {
	if g.Expires == nil {
		return "never"
	}
	return g.Expires.UTC().Format(time.RFC3339)
}

// meaning is what of a grant in force decides, beside its destinations.
func meaning(g *grant.Grant) string {
	text, err := json.Marshal([]any{cmp.Or(g.Effect, grant.Allow), g.From, g.Protocol(), methodsOf(g), pathsOf(g)})
	if err != nil {
		panic("diff: " + err.Error()) // texts and lists of them
	}
	return string(text)
}

func methodsOf(g *grant.Grant) []string {
	switch {
	case g.HTTP != nil:
		return g.HTTP.Methods
	case g.GRPC != nil:
		return g.GRPC.Methods
	}
	return nil
}

func pathsOf(g *grant.Grant) []string {
	switch {
	case g.HTTP != nil:
		return g.HTTP.Paths
	case g.GRPC != nil:
		return g.GRPC.Services
	}
	return nil
}

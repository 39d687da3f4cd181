package grant

// This file puts into words how far a grant is from a call.

import (
	"fmt"
	"strings"
	"time"

	"merlon.dev/policy"
)

// Explain says in one sentence what of the call in keeps g from it at now, as
// "grant web-reads-orders: method POST not in [GET]", and how many things that are.
func (g *Grant) Explain(in *policy.Input, now time.Time) (sentence string, lacks int) {
	words := g.lacks(in, now)
	if len(words) == 0 {
		return fmt.Sprintf("grant %s matches", g.ID), 0
	}
	return fmt.Sprintf("grant %s: %s", g.ID, strings.Join(words, "; ")), len(words)
}

// lacks lists what of the call in is not in g, the farthest first. Path and method
// are compared only for the protocol that g is about.
func (g *Grant) lacks(in *policy.Input, now time.Time) (lacks []string) {
	lack := func(format string, args ...any) { lacks = append(lacks, fmt.Sprintf(format, args...)) }
	if !anyMatches(g.To, in.Destination, MatchSPIFFEID) {
		lack("destination %s not in %s", orNone(in.Destination), some(g.To))
	}
	if !anyMatches(g.From, in.Source, MatchSPIFFEID) {
		lack("source %s not in %s", orNone(in.Source), some(g.From))
	}
	if g.Expired(now) {
		lack("expired at %s", g.Expires.UTC().Format(time.RFC3339))
	}
	if g.Protocol() != in.Protocol {
		lack("protocol %s not in [%s]", in.Protocol, g.Protocol())
		return lacks
	}
	path, method, what, matches := in.Path, in.Method, "path", MatchPath
	if g.GRPC != nil {
		var ok bool
		if path, method, ok = policy.SplitRPC(in.Path); !ok {
			lack("path %s is no /package.Service/Method", in.Path)
			return lacks
		}
		what, matches = "service", func(a, b string) bool { return a == b }
	}
	if !anyMatches(g.paths(), path, matches) {
		lack("%s %s not in %s", what, path, some(g.paths()))
	}
	if !anyMatches(g.methods(), method, func(a, b string) bool { return a == b }) {
		lack("method %s not in %s", method, some(g.methods()))
	}
	return lacks
}

func orNone(id string) string {
	if id == "" {
		return "(none)"
	}
	return id
}

// some lists a few of items.
func some(items []string) string {
	const few = 8
	if len(items) <= few {
		return "[" + strings.Join(items, ", ") + "]"
	}
	return fmt.Sprintf("[%s and %d more]", strings.Join(items[:few], ", "), len(items)-few)
}

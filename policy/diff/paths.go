package diff

// This file computes with sets of paths, exactly. A set is an automaton that reads a
// path segment by segment, each kept once: equal sets are equal numbers, and what the
// policies have in common costs nothing.

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"merlon.dev/policy"
)

// set is a set of paths, or of what is left of them behind some segments, by its
// place in paths.nodes.
type set int

const (
	none set = 0
	all  set = 1
)

// maxNodes bounds what is computed: patterns that overlap in every way they can have
// as many combinations as there are subsets of them.
const maxNodes = 1 << 18

var errOverlap = errors.New("too many path patterns of one caller and service overlap to compare them exactly")

// node is a set by what may come next. A path is its segments behind the first "/":
// "/" is one empty segment, and only the last can be empty.
type node struct {
	end   bool   // it may end here
	empty bool   // it may end with one empty segment: "…/"
	other set    // what may follow any segment that has no edge of its own
	edges []edge // by segment; none leads where other does
}

type edge struct {
	segment string // not empty, decoded
	to      set
}

// paths has the sets of one comparison. It is not safe for concurrent use.
type paths struct {
	nodes []node
	known map[string]set
	done  map[operation]set
	err   error
}

type operation struct {
	minus bool // else union
	a, b  set
}

func newPaths() *paths {
	return &paths{
		nodes: []node{none: {}, all: {end: true, empty: true, other: all}},
		known: map[string]set{}, done: map[operation]set{},
	}
}

// add returns the set that n is. Sorted edges are expected.
func (p *paths) add(n node) set {
	n.edges = slices.DeleteFunc(n.edges, func(e edge) bool { return e.to == n.other })
	if len(n.edges) == 0 {
		switch {
		case !n.end && !n.empty && n.other == none:
			return none
		case n.end && n.empty && n.other == all:
			return all
		}
	}
	var key strings.Builder
	fmt.Fprintf(&key, "%t %t %d", n.end, n.empty, n.other)
	for _, e := range n.edges {
		fmt.Fprintf(&key, " %q %d", e.segment, e.to)
	}
	if s, ok := p.known[key.String()]; ok {
		return s
	}
	if len(p.nodes) >= maxNodes {
		p.err = errOverlap
		return none
	}
	s := set(len(p.nodes))
	p.nodes = append(p.nodes, n)
	p.known[key.String()] = s
	return s
}

// after is what may follow segment in s.
func (p *paths) after(s set, segment string) set {
	n := &p.nodes[s]
	if i, ok := slices.BinarySearchFunc(n.edges, segment, func(e edge, t string) int { return strings.Compare(e.segment, t) }); ok {
		return n.edges[i].to
	}
	return n.other
}

func (p *paths) union(a, b set) set { return p.do(operation{false, a, b}) }

func (p *paths) minus(a, b set) set { return p.do(operation{true, a, b}) }

func (p *paths) both(a, b set) set { return p.minus(a, p.minus(a, b)) }

func (p *paths) do(o operation) set {
	switch a, b := o.a, o.b; {
	case p.err != nil:
		return none
	case o.minus && (a == b || a == none || b == all):
		return none
	case o.minus && b == none:
		return a
	case !o.minus && (a == b || b == none || a == all):
		return a
	case !o.minus && (a == none || b == all):
		return b
	}
	if s, ok := p.done[o]; ok {
		return s
	}
	a, b := p.nodes[o.a], p.nodes[o.b]
	n := node{end: o.has(a.end, b.end), empty: o.has(a.empty, b.empty), other: p.do(operation{o.minus, a.other, b.other})}
	for _, segment := range segments(a.edges, b.edges) {
		n.edges = append(n.edges, edge{segment, p.do(operation{o.minus, p.after(o.a, segment), p.after(o.b, segment)})})
	}
	s := p.add(n)
	p.done[o] = s
	return s
}

func (o operation) has(a, b bool) bool {
	if o.minus {
		return a && !b
	}
	return a || b
}

func segments(a, b []edge) []string {
	names := make([]string, 0, len(a)+len(b))
	for _, e := range a {
		names = append(names, e.segment)
	}
	for _, e := range b {
		names = append(names, e.segment)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// any is the set of all paths. They have a segment; what may follow one is all.
func (p *paths) any() set { return p.add(node{empty: true, other: all}) }

// pattern is the set of what a grant's path pattern matches; see grant.MatchPath.
func (p *paths) pattern(text string) set {
	base, more := strings.CutSuffix(text, "/*")
	s := p.add(node{end: true})
	if more {
		s = p.add(node{other: all})
	}
	parts := strings.Split(base, "/")[1:] // none of "", as in "/*"
	if base == "" {
		parts = nil
	}
	for _, part := range slices.Backward(parts) {
		switch {
		case part == "":
			s = p.add(node{empty: true})
		case strings.HasPrefix(part, "{"):
			s = p.add(node{other: s})
		default:
			s = p.add(node{edges: []edge{{policy.DecodePath(part), s}}})
		}
	}
	return s
}

// service is the set of one gRPC service, or of any where it is empty.
func (p *paths) service(name string) set {
	end := p.add(node{end: true})
	if name == "" {
		return p.add(node{other: end})
	}
	return p.add(node{edges: []edge{{name, end}}})
}

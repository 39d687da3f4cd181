package program

// This file says whether one grant matches a call. What grants mean is said in
// policy/grant, whose plain matcher tests hold this one against.

import (
	"encoding/binary"
	"math"
	"slices"
	"strings"

	"merlon.dev/policy"
)

// few is up to how many items are compared one by one; more are hashed.
const few = 8

// call is what grants compare.
type call struct {
	path, method string
	noPath       bool // a gRPC call whose path names no method
}

func (c *call) of(in *policy.Input) {
	switch in.Protocol {
	case policy.HTTP:
		c.path, c.method = policy.DecodePath(in.Path), in.Method
	case policy.GRPC:
		var ok bool
		c.path, c.method, ok = policy.SplitRPC(in.Path)
		c.noPath = !ok
	}
}

// rule is one grant as one pattern for callers has it.
type rule struct {
	id    string
	order uint32 // among all grants of the program
	kind  Kind
	terms *terms
}

// terms are what a grant asks of a call but for its caller. Grants that ask the
// same share them.
type terms struct {
	expires  int64
	anyPath  bool
	paths    set // single ones
	patterns []Path
	anyWay   bool // any method
	methods  set
}

func newTerms(g *Grant) *terms {
	t := &terms{expires: g.Expires, anyPath: g.Paths == nil, anyWay: g.Methods == nil, methods: newSet(g.Methods)}
	if t.expires == 0 {
		t.expires = math.MaxInt64
	}
	var single []string
	for _, p := range g.Paths {
		if p.Parts == nil && !p.More {
			single = append(single, p.Text)
		} else {
			t.patterns = append(t.patterns, p)
		}
	}
	t.paths = newSet(single)
	return t
}

// appendTerms appends what newTerms reads of g, so that no two grants with other
// terms give the same bytes.
func appendTerms(b []byte, g *Grant) []byte {
	text := func(s string) {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	flags := func(flags ...bool) {
		for _, f := range flags {
			if f {
				b = append(b, 1)
			} else {
				b = append(b, 0)
			}
		}
	}
	b = binary.AppendVarint(b, g.Expires)
	flags(g.Paths == nil, g.Methods == nil)
	b = binary.AppendUvarint(b, uint64(len(g.Methods)))
	for _, m := range g.Methods {
		text(m)
	}
	for i := range g.Paths {
		p := &g.Paths[i]
		text(p.Text)
		flags(p.More, p.Parts == nil)
		b = binary.AppendUvarint(b, uint64(len(p.Parts)))
		for _, part := range p.Parts {
			text(part.Text)
			flags(part.Free)
		}
	}
	return b
}

func (t *terms) live(at int64) bool { return t.expires == math.MaxInt64 || at < t.expires }

func (t *terms) match(c *call, at int64) bool {
	return t.live(at) && (t.anyWay || t.methods.has(c.method)) && t.pathFits(c)
}

func (t *terms) pathFits(c *call) bool {
	if c.noPath {
		return false
	}
	if t.anyPath || t.paths.has(c.path) {
		return true
	}
	for i := range t.patterns {
		if t.patterns[i].matches(c.path) {
			return true
		}
	}
	return false
}

func (p *Path) matches(path string) bool {
	if p.Parts == nil {
		return len(path) > len(p.Text)+1 && path[len(p.Text)] == '/' && path[:len(p.Text)] == p.Text
	}
	if path == "" || path[0] != '/' {
		return false
	}
	rest, more := path[1:], true
	for i := range p.Parts {
		if !more {
			return false
		}
		var segment string
		segment, rest, more = strings.Cut(rest, "/")
		if part := &p.Parts[i]; part.Free && segment == "" || !part.Free && segment != part.Text {
			return false
		}
	}
	if p.More {
		return more && rest != "" && rest[0] != '/'
	}
	return !more
}

// set is a set of strings.
type set struct {
	few  []string
	many map[string]bool
}

func newSet(items []string) (s set) {
	if len(items) <= few {
		return set{few: items}
	}
	s.many = make(map[string]bool, len(items))
	for _, item := range items {
		s.many[item] = true
	}
	return s
}

func (s *set) has(item string) bool {
	if s.many != nil {
		return s.many[item]
	}
	return slices.Contains(s.few, item)
}

func (s *set) all() func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for _, item := range s.few {
			if !yield(item) {
				return
			}
		}
		for item := range s.many {
			if !yield(item) {
				return
			}
		}
	}
}

package diff

// This file writes sets of paths as people write them: patterns of grants, and
// patterns for what is to be left out.

import (
	"errors"
	"fmt"
	"strings"
)

// piece is all that patterns match but what except match. Nil patterns match any path.
type piece struct{ patterns, except []string }

// maxPieces bounds how often a set is cut in two to be written.
const maxPieces = 1000

// pieces writes s. Together they are s and nothing else.
func (p *paths) pieces(s set) ([]piece, error) {
	var out []piece
	for s != none {
		within := p.around(s)
		without := p.around(p.minus(p.of(within), s))
		out = append(out, piece{within, without})
		rest := p.both(s, p.of(without)) // too much was left out
		if p.err != nil {
			return nil, p.err
		}
		if rest == s || len(out) > maxPieces {
			return nil, errors.New("the paths cannot be written as patterns")
		}
		s = rest
	}
	return out, nil
}

// of is the set of what patterns match.
func (p *paths) of(patterns []string) set {
	s := none
	for _, text := range patterns {
		if text == anything {
			return p.any()
		}
		s = p.union(s, p.pattern(text))
	}
	return s
}

// anything stands for every path among patterns.
const anything = "*"

// around gives patterns that match all of s, and little more: where a segment may be
// any but some, they let it be any.
func (p *paths) around(s set) []string {
	if s == none {
		return nil
	}
	if p.nodes[s].other == all && p.nodes[s].empty {
		return []string{anything}
	}
	return p.append(nil, s, "")
}

func (p *paths) append(list []string, s set, before string) []string {
	n := p.nodes[s]
	if n.end {
		list = append(list, before)
	}
	if n.empty {
		list = append(list, before+"/")
	}
	if n.other == all {
		return append(list, before+"/*")
	}
	if n.other != none {
		list = p.append(list, n.other, before+"/{x}")
	}
	for _, e := range n.edges {
		if further := p.minus(e.to, n.other); further != none {
			list = p.append(list, further, before+"/"+escape(e.segment))
		}
	}
	return list
}

// escape writes a decoded segment so that a pattern of it means itself.
func escape(segment string) string {
	var b strings.Builder
	for i := range len(segment) {
		if c := segment[i]; strings.IndexByte("{}*?#;%", c) >= 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// names writes a set of gRPC services.
func (p *paths) names(s set) piece {
	n := p.nodes[s]
	var out piece
	for _, e := range n.edges {
		if n.other == none {
			out.patterns = append(out.patterns, e.segment)
		} else {
			out.except = append(out.except, e.segment)
		}
	}
	return out
}

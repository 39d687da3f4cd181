package program

// This file finds the grants that concern a caller: one hash lookup for its SPIFFE
// ID, and one for each kind of pattern that is in use. What grants share is kept
// once, and the rules of one pattern stand side by side: with many grants, a
// decision costs what it fetches from memory.

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"merlon.dev/policy"
)

// index has rules by protocol and caller.
type index struct {
	by    [3]callers
	rules []rule // those of one pattern side by side, by kind and then by ID
	many  []many
}

// callers has rules by what they say of the caller.
type callers struct {
	any     span
	named   map[string]span // by SPIFFE ID or trust domain, as written
	below   map[string]span // by "spiffe://td/ns/x/"
	depths  []int           // numbers of slashes that keys of below have
	domains bool            // some key of named is a trust domain
}

// span are the rules of one pattern for callers. The zero value has none.
type span struct {
	at, n uint32
	many  uint32 // place in index.many, from 1; 0 where there are few
}

func protocolNumber(p policy.Protocol) int {
	switch p {
	case policy.HTTP:
		return 0
	case policy.GRPC:
		return 1
	case policy.TCP:
		return 2
	}
	return -1
}

// pattern is one that the grants of one protocol have for callers: a key of
// callers.named or below, or that for any caller.
type pattern struct {
	protocol int
	from     string
	any      bool
}

func newIndex(grants []Grant) (*index, error) {
	rules, order := map[pattern][]rule{}, []pattern(nil)
	shared, room := map[string]*terms{}, []byte(nil)
	for i := range grants {
		g := &grants[i]
		n := protocolNumber(g.Protocol)
		if n < 0 || g.Kind < Deny || g.Kind > DryRunDeny {
			return nil, fmt.Errorf("program: grant %q has kind %d and protocol %q", g.ID, g.Kind, g.Protocol)
		}
		room = appendTerms(room[:0], g)
		t := shared[string(room)]
		if t == nil {
			t = newTerms(g)
			shared[string(room)] = t
		}
		r := rule{id: g.ID, order: uint32(i), kind: g.Kind, terms: t}
		add := func(p pattern) {
			of := rules[p]
			if of == nil {
				order = append(order, p)
			}
			if len(of) == 0 || of[len(of)-1].order != r.order { // a grant can name a pattern twice
				rules[p] = append(of, r)
			}
		}
		if g.From == nil {
			add(pattern{protocol: n, any: true})
		}
		for _, from := range g.From {
			add(pattern{protocol: n, from: from})
		}
	}
	x := &index{}
	for _, p := range order {
		x.put(p, rules[p])
	}
	return x, nil
}

func (x *index) put(p pattern, rules []rule) {
	slices.SortStableFunc(rules, func(a, b rule) int { return cmp.Compare(a.kind, b.kind) })
	s := span{at: uint32(len(x.rules)), n: uint32(len(rules))}
	x.rules = append(x.rules, rules...)
	if len(rules) > few {
		x.many = append(x.many, newMany(rules))
		s.many = uint32(len(x.many))
	}
	c := &x.by[p.protocol]
	base, below := strings.CutSuffix(p.from, "*")
	switch {
	case p.any:
		c.any = s
	case below:
		if c.below == nil {
			c.below = map[string]span{}
		}
		c.below[base] = s
		if n := strings.Count(base, "/"); !slices.Contains(c.depths, n) {
			c.depths = append(c.depths, n)
		}
	default:
		if c.named == nil {
			c.named = map[string]span{}
		}
		c.named[p.from] = s
		c.domains = c.domains || strings.Count(p.from, "/") == 2
	}
}

// found are the rules that concern one caller, by pattern.
type found struct {
	in   *index
	some [few]span
	n    int
	more []span
}

func (f *found) add(s span) {
	switch {
	case s.n == 0:
	case f.n < few:
		f.some[f.n] = s
		f.n++
	default:
		f.more = append(f.more, s)
	}
}

// at is the i-th span; one without rules behind the last.
func (f *found) at(i int) span {
	switch {
	case i < f.n:
		return f.some[i]
	case i-few < len(f.more) && i >= few:
		return f.more[i-few]
	}
	return span{}
}

func (f *found) lookup(source string, protocol policy.Protocol) {
	n := protocolNumber(protocol)
	if n < 0 {
		return
	}
	c := &f.in.by[n]
	f.add(c.any)
	if c.named != nil {
		f.add(c.named[source])
	}
	if !c.domains && c.below == nil {
		return
	}
	slashes := 0
	for i := range len(source) {
		if source[i] != '/' {
			continue
		}
		slashes++
		if slashes == 3 && c.domains {
			f.add(c.named[source[:i]])
		}
		if slashes > 2 && i+1 < len(source) && slices.Contains(c.depths, slashes) {
			f.add(c.below[source[:i+1]])
		}
	}
}

// rules are those of s.
func (f *found) rules(s span) []rule { return f.in.rules[s.at : s.at+s.n] }

// first is the matching rule of kind k with the least ID; nil for none.
func (f *found) first(k Kind, c *call, at int64) (best *rule) {
	for i := 0; ; i++ {
		s := f.at(i)
		if s.n == 0 {
			return best
		}
		rules := f.rules(s)
		var r *rule
		if s.many > 0 {
			r = f.in.many[s.many-1].first(rules, k, c, at)
		} else {
			for j := range rules {
				if rules[j].kind == k && rules[j].terms.match(c, at) {
					r = &rules[j]
					break
				}
			}
		}
		if r != nil && (best == nil || r.order < best.order) {
			best = r
		}
	}
}

// nearest is the reason of a call that nothing allows.
func (f *found) nearest(c *call, at int64) policy.Reason {
	reason := policy.NoGrant
	for i := 0; ; i++ {
		s := f.at(i)
		if s.n == 0 {
			return reason
		}
		rules := f.rules(s)
		if s.many > 0 {
			m := &f.in.many[s.many-1]
			if m.pathFits(rules, c, at) {
				return policy.MethodNotGranted
			}
			rules = m.of(rules, Allow)
		}
		for j := range rules {
			r := &rules[j]
			if r.kind != Allow || !r.terms.live(at) {
				continue
			}
			reason = policy.PathNotGranted
			if s.many > 0 {
				break // their paths have been looked at
			}
			if r.terms.pathFits(c) {
				return policy.MethodNotGranted
			}
		}
	}
}

// dryRun has the IDs of the matching dry-run grants by effect, sorted.
func (f *found) dryRun(c *call, at int64) (allows, denies []string) {
	for i := 0; ; i++ {
		s := f.at(i)
		if s.n == 0 {
			break
		}
		rules := f.rules(s)
		for j := len(rules) - 1; j >= 0 && rules[j].kind >= DryRun; j-- {
			switch r := &rules[j]; {
			case !r.terms.match(c, at):
			case r.kind == DryRun:
				allows = append(allows, r.id)
			default:
				denies = append(denies, r.id)
			}
		}
	}
	slices.Sort(allows)
	slices.Sort(denies)
	return slices.Compact(allows), slices.Compact(denies)
}

// many finds the rules of one pattern by path, where they are many.
type many struct {
	ends   [DryRunDeny + 1]int // of each kind's rules, which begin where those of the kind before end
	byPath [DryRunDeny + 1]map[string][]int
	others [DryRunDeny + 1][]int // those that do not name single paths only
}

func newMany(rules []rule) (m many) {
	for i := range rules {
		r := &rules[i]
		for k := r.kind; k <= DryRunDeny; k++ {
			m.ends[k] = i + 1
		}
		if r.terms.anyPath || r.terms.patterns != nil {
			m.others[r.kind] = append(m.others[r.kind], i)
			continue
		}
		if m.byPath[r.kind] == nil {
			m.byPath[r.kind] = map[string][]int{}
		}
		for path := range r.terms.paths.all() {
			m.byPath[r.kind][path] = append(m.byPath[r.kind][path], i)
		}
	}
	return m
}

// of are the rules of kind k.
func (m *many) of(rules []rule, k Kind) []rule { return rules[m.ends[k-1]:m.ends[k]] }

func (m *many) first(rules []rule, k Kind, c *call, at int64) *rule {
	best := len(rules)
	for _, positions := range [...][]int{m.byPath[k][c.path], m.others[k]} {
		for _, i := range positions {
			if i < best && rules[i].terms.match(c, at) {
				best = i
				break
			}
		}
	}
	if best < len(rules) {
		return &rules[best]
	}
	return nil
}

// pathFits says whether a rule that allows matches but for the method.
func (m *many) pathFits(rules []rule, c *call, at int64) bool {
	for _, positions := range [...][]int{m.byPath[Allow][c.path], m.others[Allow]} {
		for _, i := range positions {
			if t := rules[i].terms; t.live(at) && t.pathFits(c) {
				return true
			}
		}
	}
	return false
}

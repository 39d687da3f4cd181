package program

// This file matches a call against grants. What they mean is said in
// policy/grant, whose plain matcher tests hold this one against; here it is one
// hash lookup for the caller and one for each kind of pattern that is in use.

import (
	"fmt"
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

func callOf(in *policy.Input) (c call) {
	switch in.Protocol {
	case policy.HTTP:
		c.path, c.method = policy.DecodePath(in.Path), in.Method
	case policy.GRPC:
		var ok bool
		c.path, c.method, ok = policy.SplitRPC(in.Path)
		c.noPath = !ok
	}
	return c
}

// index has grants by protocol and caller.
type index [3]callers

// callers has grants by what they say of the caller.
type callers struct {
	any     *leaf
	named   map[string]*leaf // by SPIFFE ID or trust domain, as written
	below   map[string]*leaf // by "spiffe://td/ns/x/"
	depths  []int            // numbers of slashes that keys of below have
	domains bool             // some key of named is a trust domain
}

// leaf has the grants of one pattern for callers, by Kind.
type leaf [DryRun]list

func (l *leaf) of(k Kind) *list { return &l[k-1] }

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

func newIndex(grants []Grant) (x index, err error) {
	for i := range grants {
		g := &grants[i]
		n := protocolNumber(g.Protocol)
		if n < 0 || g.Kind < Deny || g.Kind > DryRun {
			return index{}, fmt.Errorf("program: grant %q has kind %d and protocol %q", g.ID, g.Kind, g.Protocol)
		}
		it := newItem(g, i)
		if g.From == nil {
			x[n].any = x[n].any.with(g.Kind, it)
		}
		for _, from := range g.From {
			x[n].add(from, g.Kind, it)
		}
	}
	for i := range x {
		for l := range x[i].all() {
			for k := range l {
				l[k].arrange()
			}
		}
	}
	return x, nil
}

func (l *leaf) with(k Kind, it *item) *leaf {
	if l == nil {
		l = new(leaf)
	}
	l.of(k).add(it)
	return l
}

func (c *callers) add(from string, k Kind, it *item) {
	if base, ok := strings.CutSuffix(from, "*"); ok {
		if c.below == nil {
			c.below = map[string]*leaf{}
		}
		c.below[base] = c.below[base].with(k, it)
		if n := strings.Count(base, "/"); !slices.Contains(c.depths, n) {
			c.depths = append(c.depths, n)
		}
		return
	}
	if c.named == nil {
		c.named = map[string]*leaf{}
	}
	c.named[from] = c.named[from].with(k, it)
	c.domains = c.domains || strings.Count(from, "/") == 2
}

func (c *callers) all() func(yield func(*leaf) bool) {
	return func(yield func(*leaf) bool) {
		if c.any != nil && !yield(c.any) {
			return
		}
		for _, m := range []map[string]*leaf{c.named, c.below} {
			for _, l := range m {
				if !yield(l) {
					return
				}
			}
		}
	}
}

// found are the leaves for one caller.
type found struct {
	some [few]*leaf
	n    int
	more []*leaf
}

func (f *found) add(l *leaf) {
	switch {
	case l == nil:
	case f.n < few:
		f.some[f.n] = l
		f.n++
	default:
		f.more = append(f.more, l)
	}
}

// at is the i-th leaf, nil behind the last one.
func (f *found) at(i int) *leaf {
	switch {
	case i < f.n:
		return f.some[i]
	case i-few < len(f.more) && i >= few:
		return f.more[i-few]
	}
	return nil
}

func (x *index) lookup(source string, protocol policy.Protocol) (f found) {
	n := protocolNumber(protocol)
	if n < 0 {
		return f
	}
	c := &x[n]
	f.add(c.any)
	if c.named != nil {
		f.add(c.named[source])
	}
	if !c.domains && c.below == nil {
		return f
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
	return f
}

// first is the matching grant of kind k with the least ID; nil for none.
func (f *found) first(k Kind, c *call, at int64) (best *item) {
	for i := 0; ; i++ {
		l := f.at(i)
		if l == nil {
			return best
		}
		if it := l.of(k).first(c, at); it != nil && (best == nil || it.order < best.order) {
			best = it
		}
	}
}

// nearest is the reason of a call that nothing allows.
func (f *found) nearest(c *call, at int64) policy.Reason {
	reason := policy.NoGrant
	for i := 0; ; i++ {
		l := f.at(i)
		if l == nil {
			return reason
		}
		switch allow := l.of(Allow); {
		case allow.pathFits(c, at):
			return policy.MethodNotGranted
		case allow.live(at):
			reason = policy.PathNotGranted
		}
	}
}

func (p *Program) dryRun(f *found, c *call, at int64) (ids []string) {
	for i := 0; ; i++ {
		l := f.at(i)
		if l == nil {
			break
		}
		items := l.of(DryRun).items
		for i := range items {
			if items[i].matches(c, at) {
				ids = append(ids, items[i].id)
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// list has the grants of one kind, sorted by ID.
type list struct {
	items []item
	// Where items are many: those that name single paths, by each of these, and
	// all others, as positions in items.
	byPath map[string][]int
	others []int
	// lasting is whether some grant never expires.
	lasting bool
}

func (l *list) add(it *item) {
	if n := len(l.items); n == 0 || l.items[n-1].order != it.order { // a grant can name a pattern twice
		l.items = append(l.items, *it)
	}
	l.lasting = l.lasting || it.expires == math.MaxInt64
}

func (l *list) arrange() {
	if len(l.items) <= few {
		return
	}
	l.byPath = map[string][]int{}
	for i := range l.items {
		it := &l.items[i]
		if it.anyPath || it.patterns != nil {
			l.others = append(l.others, i)
			continue
		}
		for path := range it.paths.all() {
			l.byPath[path] = append(l.byPath[path], i)
		}
	}
}

func (l *list) first(c *call, at int64) *item {
	if l.byPath == nil {
		for i := range l.items {
			if l.items[i].matches(c, at) {
				return &l.items[i]
			}
		}
		return nil
	}
	best := len(l.items)
	for _, positions := range [...][]int{l.byPath[c.path], l.others} {
		for _, i := range positions {
			if i < best && l.items[i].matches(c, at) {
				best = i
				break
			}
		}
	}
	if best < len(l.items) {
		return &l.items[best]
	}
	return nil
}

func (l *list) pathFits(c *call, at int64) bool {
	if l.byPath == nil {
		for i := range l.items {
			if l.fits(i, c, at) {
				return true
			}
		}
		return false
	}
	for _, positions := range [...][]int{l.byPath[c.path], l.others} {
		for _, i := range positions {
			if l.fits(i, c, at) {
				return true
			}
		}
	}
	return false
}

// fits is pathFits for one grant of the list.
func (l *list) fits(i int, c *call, at int64) bool {
	return l.items[i].live(at) && l.items[i].pathFits(c)
}

func (l *list) live(at int64) bool {
	if l.lasting {
		return true
	}
	for i := range l.items {
		if l.items[i].live(at) {
			return true
		}
	}
	return false
}

// item is one grant, ready to be compared.
type item struct {
	id       string
	order    int // among all grants of the program
	expires  int64
	anyPath  bool
	paths    set // single ones
	patterns []Path
	anyWay   bool // any method
	methods  set
}

func newItem(g *Grant, order int) *item {
	it := &item{id: g.ID, order: order, expires: g.Expires, anyPath: g.Paths == nil, anyWay: g.Methods == nil, methods: newSet(g.Methods)}
	if it.expires == 0 {
		it.expires = math.MaxInt64
	}
	var single []string
	for _, p := range g.Paths {
		if p.Parts == nil && !p.More {
			single = append(single, p.Text)
		} else {
			it.patterns = append(it.patterns, p)
		}
	}
	it.paths = newSet(single)
	return it
}

func (it *item) live(at int64) bool { return it.expires == math.MaxInt64 || at < it.expires }

func (it *item) matches(c *call, at int64) bool {
	return it.live(at) && (it.anyWay || it.methods.has(c.method)) && it.pathFits(c)
}

func (it *item) pathFits(c *call) bool {
	if c.noPath {
		return false
	}
	if it.anyPath || it.paths.has(c.path) {
		return true
	}
	for i := range it.patterns {
		if it.patterns[i].matches(c.path) {
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

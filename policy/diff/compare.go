package diff

// This file compares grants place by place: for each place among the destinations the
// grants that cover it, for each place among their sources those that cover that, and
// then methods and paths. Neighbours that differ in the same way become one set.

import (
	"encoding/json"
	"errors"
	"slices"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// comparison is of two sets of grants in force.
type comparison struct {
	paths    *paths
	a, b     []*grant.Grant
	meanings map[*grant.Grant]string
	covers   map[*grant.Grant]set
}

// change is what differs at one place: rows for added and removed access, whose place
// is filled in by who asks.
type change struct{ added, removed []Access }

func (c *comparison) destinations() (added, removed []Access, err error) {
	to := func(g *grant.Grant) []string { return g.To }
	var lists [][]string
	for _, g := range slices.Concat(c.a, c.b) {
		lists = append(lists, g.To)
	}
	byA, byB := byPattern(c.a, to), byPattern(c.b, to)
	all, err := c.each(tree(lists...), func(at *place) (change, error) {
		return c.sources(covering(at, byA), covering(at, byB))
	}, func(row *Access, pattern string, except []string) {
		row.Destination, row.DestinationExcept = pattern, except
	})
	return all.added, all.removed, err
}

// sources compares two sets of grants for one destination.
func (c *comparison) sources(a, b []*grant.Grant) (change, error) {
	if c.sameMeaning(a, b) {
		return change{}, nil
	}
	from := func(g *grant.Grant) []string { return g.From }
	var lists [][]string
	for _, g := range slices.Concat(a, b) {
		lists = append(lists, g.From)
	}
	byA, byB := byPattern(a, from), byPattern(b, from)
	return c.each(tree(lists...), func(at *place) (change, error) {
		return c.protocols(covering(at, byA), covering(at, byB))
	}, func(row *Access, pattern string, except []string) { row.Source, row.SourceExcept = pattern, except })
}

// each asks compare about all places. A row that is the same around a place and within
// it becomes one; place writes where a row is.
func (c *comparison) each(places []*place, compare func(*place) (change, error), write func(*Access, string, []string)) (out change, err error) {
	added, removed := make(table, len(places)), make(table, len(places))
	for _, at := range places {
		differs, err := compare(at)
		if err != nil {
			return change{}, err
		}
		if err := errors.Join(added.put(at, differs.added), removed.put(at, differs.removed)); err != nil {
			return change{}, err
		}
	}
	return change{added.rows(places, write), removed.rows(places, write)}, nil
}

// table has the rows of each place, and of each its text.
type table map[*place][]keyed

type keyed struct {
	key string
	row Access
}

func (t table) put(at *place, rows []Access) error {
	for _, row := range rows {
		key, err := json.Marshal(row)
		if err != nil {
			return err
		}
		t[at] = append(t[at], keyed{string(key), row})
	}
	return nil
}

func (t table) has(at *place, key string) bool {
	return slices.ContainsFunc(t[at], func(k keyed) bool { return k.key == key })
}

func (t table) rows(places []*place, write func(*Access, string, []string)) (rows []Access) {
	for _, at := range places {
		for _, k := range t[at] {
			if at.parent == nil || !t.has(at.parent, k.key) {
				write(&k.row, at.pattern, t.exceptions(nil, at, k.key))
				rows = append(rows, k.row)
			}
		}
	}
	return rows
}

// exceptions are the patterns within at, as far as they go, that do not have its row.
func (t table) exceptions(list []string, at *place, key string) []string {
	for _, child := range at.children {
		if t.has(child, key) {
			list = t.exceptions(list, child, key)
		} else {
			list = append(list, child.pattern)
		}
	}
	return list
}

func byPattern(grants []*grant.Grant, of func(*grant.Grant) []string) map[string][]*grant.Grant {
	m := map[string][]*grant.Grant{}
	for _, g := range grants {
		patterns := of(g)
		if patterns == nil {
			patterns = []string{anyID}
		}
		for _, p := range patterns {
			m[p] = append(m[p], g)
		}
	}
	return m
}

// sameMeaning says whether both lists decide the same, whatever the grants are called.
func (c *comparison) sameMeaning(a, b []*grant.Grant) bool {
	means := func(grants []*grant.Grant) []string {
		texts := make([]string, len(grants))
		for i, g := range grants {
			if c.meanings[g] == "" {
				c.meanings[g] = meaning(g)
			}
			texts[i] = c.meanings[g]
		}
		slices.Sort(texts)
		return slices.Compact(texts)
	}
	return slices.Equal(means(a), means(b))
}

// protocols compares two sets of grants for one source and destination.
func (c *comparison) protocols(a, b []*grant.Grant) (out change, err error) {
	if c.sameMeaning(a, b) {
		return out, nil
	}
	for _, protocol := range []policy.Protocol{policy.HTTP, policy.GRPC, policy.TCP} {
		other := func(g *grant.Grant) bool { return g.Protocol() != protocol }
		a, b := slices.DeleteFunc(slices.Clone(a), other), slices.DeleteFunc(slices.Clone(b), other)
		before, after := c.allowed(a, b), c.allowed(b, a)
		added, err := c.rows(protocol, after, before)
		if err != nil {
			return change{}, err
		}
		removed, err := c.rows(protocol, before, after)
		if err != nil {
			return change{}, err
		}
		out.added, out.removed = append(out.added, added...), append(out.removed, removed...)
	}
	return out, c.paths.err
}

// otherMethods stands for the methods that no grant names.
const otherMethods = ""

// allowed are the paths that grants allow, by method: those that they or others name,
// and otherMethods.
func (c *comparison) allowed(grants, others []*grant.Grant) map[string]set {
	by := map[string]set{otherMethods: none}
	for _, g := range slices.Concat(grants, others) {
		for _, m := range methodsOf(g) {
			by[m] = none
		}
	}
	for method := range by {
		allow, deny := none, none
		for _, g := range grants {
			if m := methodsOf(g); m != nil && !slices.Contains(m, method) {
				continue
			}
			if g.Effect == grant.Deny {
				deny = c.paths.union(deny, c.covered(g))
			} else {
				allow = c.paths.union(allow, c.covered(g))
			}
		}
		by[method] = c.paths.minus(allow, deny)
	}
	return by
}

// covered is what the paths of g match, or its services.
func (c *comparison) covered(g *grant.Grant) set {
	s, known := c.covers[g]
	if !known {
		s = c.cover(g)
		c.covers[g] = s
	}
	return s
}

func (c *comparison) cover(g *grant.Grant) set {
	s := none
	switch items := pathsOf(g); {
	case g.GRPC != nil && items == nil:
		return c.paths.service("")
	case g.GRPC != nil:
		for _, name := range items {
			s = c.paths.union(s, c.paths.service(name))
		}
	case items == nil:
		return c.paths.any()
	default:
		for _, pattern := range items {
			s = c.paths.union(s, c.paths.pattern(pattern))
		}
	}
	return s
}

// rows are the calls in more that are not in less, by method.
func (c *comparison) rows(protocol policy.Protocol, more, less map[string]set) (rows []Access, err error) {
	methods := map[set][]string{} // those that are named, by what they have more
	var order []set
	rest := c.paths.minus(more[otherMethods], less[otherMethods])
	var except []string
	for _, m := range sorted(more) {
		if m == otherMethods {
			continue
		}
		s := c.paths.minus(more[m], less[m])
		if s == rest {
			continue
		}
		except = append(except, m)
		if methods[s] == nil {
			order = append(order, s)
		}
		methods[s] = append(methods[s], m)
	}
	write := func(s set, row Access) error {
		pieces, err := c.pieces(protocol, s)
		for _, p := range pieces {
			row.Protocol = protocol
			if protocol == policy.GRPC {
				row.Services, row.ServicesExcept = p.patterns, p.except
			} else {
				row.Paths, row.PathsExcept = p.patterns, p.except
			}
			rows = append(rows, row)
		}
		return err
	}
	if rest != none {
		if err := write(rest, Access{MethodsExcept: except}); err != nil {
			return nil, err
		}
	}
	for _, s := range order {
		if err := write(s, Access{Methods: methods[s]}); err != nil {
			return nil, err
		}
	}
	return rows, nil
}

func (c *comparison) pieces(protocol policy.Protocol, s set) ([]piece, error) {
	if s == none {
		return nil, nil
	}
	if protocol == policy.GRPC {
		return []piece{c.paths.names(s)}, nil
	}
	pieces, err := c.paths.pieces(s)
	for i := range pieces {
		if slices.Contains(pieces[i].patterns, anything) {
			pieces[i].patterns = nil
		}
	}
	return pieces, err
}

func sorted(m map[string]set) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

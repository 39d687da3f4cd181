// Package index is a persistent ordered tree: a change makes a new version
// that shares all but the changed path with the old one, which stays as it
// was. Readers therefore hold a version without a lock for as long as they
// like, and a change costs next to the same however many items there are.
//
// The tree branches 16 ways on the first hex digit in which the keys below
// differ, so it is as deep as the keys are crowded, and never rebalanced. Keys
// are meant to be spread evenly: hashes, random IDs, times.
package index

import (
	"cmp"
	"hash/maphash"
	"iter"
	"math/bits"
	"slices"
	"strconv"
	"time"
)

const (
	digits = 3 * 16 // of a Key, 4 bits each
	// maxLeaf is how many items lie side by side before they are spread over 16
	// leaves.
	maxLeaf = 32
)

// Key orders items. By convention the first number is a group, of which all
// items lie together: a hash, a time, a revision, or 0; the other two are an ID.
type Key [3]uint64

// Compare is negative, zero or positive as k comes before, is or comes after o.
func (k Key) Compare(o Key) int {
	for i := range k {
		if k[i] != o[i] {
			return cmp.Compare(k[i], o[i])
		}
	}
	return 0
}

func (k Key) digit(i int) int { return int(k[i/16]>>(60-4*(i%16))) & 15 }

// diverge is the first digit in which a and b differ, digits if they are equal.
func diverge(a, b Key) int {
	for i := range a {
		if x := a[i] ^ b[i]; x != 0 {
			return 16*i + bits.LeadingZeros64(x)/4
		}
	}
	return digits
}

var seeds = [3]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed(), maphash.MakeSeed()}

// Hash is a group for s. It differs from process to process, so that nobody can
// choose names that crowd.
func Hash(s string) uint64 { return maphash.String(seeds[0], s) }

// Time is a group for t: the second in which it lies, in order.
func Time(t time.Time) uint64 { return uint64(t.Unix()) ^ 1<<63 } // the sign goes to where it orders

// ID is the key of id in group. IDs of 32 hex digits, as the CA makes them,
// keep their order; for others it is a hash.
func ID(group uint64, id string) Key {
	if len(id) == 32 {
		high, errHigh := strconv.ParseUint(id[:16], 16, 64)
		low, errLow := strconv.ParseUint(id[16:], 16, 64)
		if errHigh == nil && errLow == nil {
			return Key{group, high, low}
		}
	}
	return Key{group, maphash.String(seeds[1], id), maphash.String(seeds[2], id)}
}

// Item is a value at its key.
type Item[T any] struct {
	Key   Key
	Value T
}

// Tree is one version. It is immutable and safe for concurrent use; the zero
// value is empty.
type Tree[T any] struct {
	root *node[T]
	len  int
}

// node is a leaf with items in order, or a branch.
type node[T any] struct {
	items  []Item[T]
	branch *branch[T]
}

// branch has at least two kids. All keys below agree with prefix in the digits
// before depth; the digit at depth says below which kid they lie.
type branch[T any] struct {
	prefix Key
	depth  int
	kids   [16]*node[T]
}

// Build makes a tree of items, which it sorts. Keys must not repeat.
func Build[T any](items []Item[T]) Tree[T] {
	slices.SortFunc(items, func(a, b Item[T]) int { return a.Key.Compare(b.Key) })
	return Tree[T]{root: build(items), len: len(items)}
}

func build[T any](items []Item[T]) *node[T] {
	if len(items) == 0 {
		return nil
	}
	if len(items) <= maxLeaf {
		return &node[T]{items: slices.Clone(items)}
	}
	b := &branch[T]{prefix: items[0].Key}
	b.depth = diverge(b.prefix, items[len(items)-1].Key)
	for len(items) > 0 {
		d := items[0].Key.digit(b.depth)
		n := 1
		for n < len(items) && items[n].Key.digit(b.depth) == d {
			n++
		}
		b.kids[d] = build(items[:n])
		items = items[n:]
	}
	return &node[T]{branch: b}
}

// Len is the number of items.
func (t Tree[T]) Len() int { return t.len }

// Get returns the value at k.
func (t Tree[T]) Get(k Key) (value T, ok bool) {
	n := t.root
	for n != nil && n.branch != nil {
		n = n.branch.kids[k.digit(n.branch.depth)]
	}
	if n == nil {
		return value, false
	}
	i, ok := n.find(k)
	if !ok {
		return value, false
	}
	return n.items[i].Value, true
}

func (n *node[T]) find(k Key) (int, bool) {
	return slices.BinarySearchFunc(n.items, k, func(it Item[T], k Key) int { return it.Key.Compare(k) })
}

// With returns the version in which value is at k.
func (t Tree[T]) With(k Key, value T) Tree[T] {
	root, added := t.root.with(Item[T]{k, value})
	if added {
		t.len++
	}
	t.root = root
	return t
}

func (n *node[T]) with(it Item[T]) (next *node[T], added bool) {
	switch {
	case n == nil:
		return &node[T]{items: []Item[T]{it}}, true
	case n.branch == nil:
		return n.withItem(it)
	}
	b := n.branch
	if d := diverge(b.prefix, it.Key); d < b.depth {
		above := &branch[T]{prefix: it.Key, depth: d}
		above.kids[b.prefix.digit(d)] = n
		above.kids[it.Key.digit(d)] = &node[T]{items: []Item[T]{it}}
		return &node[T]{branch: above}, true
	}
	changed := *b
	kid := &changed.kids[it.Key.digit(b.depth)]
	*kid, added = (*kid).with(it)
	return &node[T]{branch: &changed}, added
}

func (n *node[T]) withItem(it Item[T]) (next *node[T], added bool) {
	i, found := n.find(it.Key)
	if found {
		items := slices.Clone(n.items)
		items[i] = it
		return &node[T]{items: items}, false
	}
	items := make([]Item[T], len(n.items)+1)
	copy(items, n.items[:i])
	items[i] = it
	copy(items[i+1:], n.items[i:])
	if len(items) > maxLeaf {
		return build(items), true
	}
	return &node[T]{items: items}, true
}

// Without returns the version in which nothing is at k.
func (t Tree[T]) Without(k Key) Tree[T] {
	if root := t.root.without(k); root != t.root {
		return Tree[T]{root: root, len: t.len - 1}
	}
	return t
}

// without returns n itself if k is not below it, and nil if nothing is left.
func (n *node[T]) without(k Key) *node[T] {
	if n == nil {
		return nil
	}
	if n.branch == nil {
		i, found := n.find(k)
		switch {
		case !found:
			return n
		case len(n.items) == 1:
			return nil
		}
		return &node[T]{items: slices.Concat(n.items[:i], n.items[i+1:])}
	}
	d := k.digit(n.branch.depth)
	kid := n.branch.kids[d].without(k)
	if kid == n.branch.kids[d] {
		return n
	}
	changed := *n.branch
	changed.kids[d] = kid
	if kid == nil {
		if only := changed.onlyKid(); only != nil {
			return only
		}
	}
	return &node[T]{branch: &changed}
}

// onlyKid is the kid of a branch that has but one, and nil otherwise.
func (b *branch[T]) onlyKid() (only *node[T]) {
	for _, kid := range b.kids {
		if kid == nil {
			continue
		}
		if only != nil {
			return nil
		}
		only = kid
	}
	return only
}

// All goes over all items, in order.
func (t Tree[T]) All() iter.Seq2[Key, T] { return t.From(Key{}) }

// From goes over the items at k and after, in order.
func (t Tree[T]) From(k Key) iter.Seq2[Key, T] {
	return func(yield func(Key, T) bool) { t.root.walk(k, yield) }
}

// Group goes over the items whose key begins with group, in order.
func (t Tree[T]) Group(group uint64) iter.Seq[T] {
	return func(yield func(T) bool) {
		t.root.walk(Key{group}, func(k Key, v T) bool { return k[0] == group && yield(v) })
	}
}

// After goes over the items of k's group that come after k, in order.
func (t Tree[T]) After(k Key) iter.Seq[T] {
	return func(yield func(T) bool) {
		t.root.walk(k, func(o Key, v T) bool { return o[0] == k[0] && (o == k || yield(v)) })
	}
}

// walk says false once yield has.
func (n *node[T]) walk(from Key, yield func(Key, T) bool) bool {
	if n == nil {
		return true
	}
	if n.branch == nil {
		i, _ := n.find(from)
		for _, it := range n.items[i:] {
			if !yield(it.Key, it.Value) {
				return false
			}
		}
		return true
	}
	first := 0
	if d := diverge(n.branch.prefix, from); d >= n.branch.depth {
		first = from.digit(n.branch.depth)
	} else if from.Compare(n.branch.prefix) > 0 {
		return true // all of it comes before
	}
	for _, kid := range n.branch.kids[first:] {
		if !kid.walk(from, yield) {
			return false
		}
	}
	return true
}

// The tree against a sorted map, and what a change costs.

package index

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// genKey crowds: few groups, and IDs that agree far down.
var genKey = rapid.Custom(func(t *rapid.T) Key {
	few := rapid.Uint64Range(0, 40)
	if rapid.Bool().Draw(t, "spread") {
		return Key{few.Draw(t, "group"), rapid.Uint64().Draw(t, "high"), few.Draw(t, "low")}
	}
	return Key{few.Draw(t, "group") << 58, 0, few.Draw(t, "low")}
})

func sortedKeys(model map[Key]int) []Key {
	return slices.SortedFunc(maps.Keys(model), Key.Compare)
}

func check(t *rapid.T, tree Tree[int], model map[Key]int) {
	t.Helper()
	var got []Key
	for k, v := range tree.All() {
		if v != model[k] {
			t.Fatalf("%x holds %d; want %d", k, v, model[k])
		}
		got = append(got, k)
	}
	if want := sortedKeys(model); !slices.Equal(got, want) || tree.Len() != len(want) {
		t.Fatalf("the tree holds %d keys and says %d; want %d, in order", len(got), tree.Len(), len(want))
	}
}

// After any sequence of changes the tree holds what a map would, a version
// taken on the way has not changed, and every way to read agrees.
func TestTreeIsASortedMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tree, old Tree[int]
		model, oldModel := map[Key]int{}, map[Key]int{}
		for i := range rapid.IntRange(0, 300).Draw(t, "changes") {
			k := genKey.Draw(t, "key")
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0, 1, 2:
				keys := sortedKeys(model)
				if len(keys) > 0 && rapid.Bool().Draw(t, "known") {
					k = rapid.SampledFrom(keys).Draw(t, "which")
				}
				tree = tree.Without(k)
				delete(model, k)
			case 3:
				old, oldModel = tree, maps.Clone(model)
			default:
				tree = tree.With(k, i)
				model[k] = i
			}
		}
		check(t, tree, model)
		check(t, old, oldModel)
		k := genKey.Draw(t, "look")
		want, wantOK := model[k]
		if v, ok := tree.Get(k); v != want || ok != wantOK {
			t.Fatalf("Get(%x) = %d, %t; want %d, %t", k, v, ok, want, wantOK)
		}
		var from, group, after, wantFrom, wantGroup, wantAfter []int
		for _, v := range tree.From(k) {
			from = append(from, v)
		}
		for v := range tree.Group(k[0]) {
			group = append(group, v)
		}
		for v := range tree.After(k) {
			after = append(after, v)
		}
		for _, o := range sortedKeys(model) {
			if o.Compare(k) >= 0 {
				wantFrom = append(wantFrom, model[o])
			}
			if o[0] == k[0] {
				wantGroup = append(wantGroup, model[o])
			}
			if o[0] == k[0] && o.Compare(k) > 0 {
				wantAfter = append(wantAfter, model[o])
			}
		}
		if !slices.Equal(from, wantFrom) || !slices.Equal(group, wantGroup) || !slices.Equal(after, wantAfter) {
			t.Fatalf("From(%x), Group, After: %d, %d, %d items; want %d, %d, %d",
				k, len(from), len(group), len(after), len(wantFrom), len(wantGroup), len(wantAfter))
		}
		items := make([]Item[int], 0, len(model))
		for k, v := range model {
			items = append(items, Item[int]{k, v})
		}
		check(t, Build(items), model)
	})
}

func TestWalksEndWhenTold(t *testing.T) {
	var tree Tree[int]
	for i := range 1000 {
		tree = tree.With(Key{0, rand.Uint64(), 0}, i)
	}
	n := 0
	for range tree.All() {
		if n++; n == 40 {
			break
		}
	}
	for range tree.Group(0) {
		if n++; n == 80 {
			break
		}
	}
	if n != 80 {
		t.Errorf("walked %d items; want 80", n)
	}
}

// IDs that the CA makes and times keep their order.
func TestKeysKeepOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := rapid.StringMatching("[0-9a-f]{32}")
		a, b := id.Draw(t, "a"), id.Draw(t, "b")
		if got := ID(7, a).Compare(ID(7, b)); got != cmp.Compare(a, b) {
			t.Fatalf("ID(%s) against ID(%s): %d", a, b, got)
		}
		x, y := rapid.Int64Range(-1e11, 1e11).Draw(t, "x"), rapid.Int64Range(-1e11, 1e11).Draw(t, "y")
		if got := cmp.Compare(Time(time.Unix(x, 0)), Time(time.Unix(y, 0))); got != cmp.Compare(x, y) {
			t.Fatalf("Time(%d) against Time(%d): %d", x, y, got)
		}
	})
	if ID(1, "a") == ID(1, "b") || Hash("a") == Hash("b") {
		t.Error("names are not told apart")
	}
}

func BenchmarkChange(b *testing.B) {
	for _, n := range []int{1_000, 1_000_000} {
		b.Run(fmt.Sprintf("items=%d", n), func(b *testing.B) {
			items := make([]Item[*int], n)
			for i := range items {
				items[i].Key = Key{0, rand.Uint64(), rand.Uint64()}
			}
			tree := Build(items)
			b.ReportAllocs()
			for b.Loop() {
				k := items[rand.IntN(n)].Key
				tree = tree.Without(k).With(k, nil)
			}
		})
	}
}

// Laws of matching selectors to entries.

package cache

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var selectors = rapid.SliceOfN(rapid.SampledFrom([]string{
	"unix:uid:1", "unix:uid:2", "unix:gid:1", "unix:path:/a", "unix:path:/b", "unix:sha256:00", "docker:label:x",
}), 0, 5)

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

func drawEntries(t *rapid.T) (index, map[string]*Entry) {
	x, all := newIndex(), map[string]*Entry{}
	for i, sel := range rapid.SliceOfN(selectors, 0, 30).Draw(t, "entries") {
		e := &Entry{ID: fmt.Sprint(i), Selectors: slices.Compact(sorted(sel))}
		all[e.ID] = e
		x.add(e)
	}
	for _, id := range rapid.SliceOf(rapid.IntRange(0, 30)).Draw(t, "removed") {
		if e := all[fmt.Sprint(id)]; e != nil {
			x.remove(e)
			delete(all, e.ID)
		}
	}
	return x, all
}

func ids(entries []*Entry) (out []string) {
	for _, e := range entries {
		out = append(out, e.ID)
	}
	return out
}

func TestIndexFindsExactlyWhatMatches(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, all := drawEntries(t)
		proved := sorted(selectors.Draw(t, "proved"))
		var want []string
		for id, e := range all {
			ok := len(e.Selectors) > 0
			for _, s := range e.Selectors {
				ok = ok && slices.Contains(proved, s)
			}
			if ok {
				want = append(want, id)
			}
		}
		got := ids(x.match(proved, time.Now()))
		if slices.Sort(want); !slices.Equal(got, want) {
			t.Fatalf("match(%q) = %v; want %v", proved, got, want)
		}
	})
}

func TestMoreProofNeverTakesAnIdentityAway(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, _ := drawEntries(t)
		less := selectors.Draw(t, "proved")
		more := append(slices.Clone(less), selectors.Draw(t, "more")...)
		after := ids(x.match(sorted(more), time.Now()))
		for _, id := range ids(x.match(sorted(less), time.Now())) {
			if !slices.Contains(after, id) {
				t.Fatalf("entry %s is matched by %q and not by %q", id, less, more)
			}
		}
	})
}

func TestNothingProvedMatchesNothingAndNoSelectorsMatchNobody(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, _ := drawEntries(t)
		if got := x.match(nil, time.Now()); len(got) != 0 {
			t.Fatalf("match(nothing) = %v", ids(got))
		}
		for _, e := range x.match(sorted(selectors.Draw(t, "proved")), time.Now()) {
			if len(e.Selectors) == 0 {
				t.Fatal("an entry without selectors was matched")
			}
		}
	})
}

func TestRenewalIsAtHalfLifeWithinTenPercent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1e9, 0)
		life := time.Duration(rapid.Int64Range(1, int64(24*time.Hour)).Draw(t, "life"))
		at := float64(RenewAt(now, now.Add(life)).Sub(now)) / float64(life)
		if at < 0.449 && life > 1000 || at > 0.551 {
			t.Fatalf("renewed at %.3f of %v", at, life)
		}
	})
}

func BenchmarkMatch100000Entries(b *testing.B) {
	x := newIndex()
	for i := range 100_000 {
		x.add(&Entry{ID: fmt.Sprint(i), Selectors: []string{fmt.Sprintf("unix:path:/%d", i), "unix:uid:1"}})
	}
	proved := []string{"unix:gid:1", "unix:path:/77", "unix:uid:1"}
	for b.Loop() {
		if len(x.match(proved, time.Time{})) == 0 {
			b.Fatal("no match")
		}
	}
}

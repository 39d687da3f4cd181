// The list of the node's SPIFFE IDs is always that of its entries.

package cache

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/capb"
)

// called is an entry of this name that ends after a while; 0: never.
func called(name string, ends time.Duration) *Entry {
	e := &Entry{ID: name, SPIFFEID: spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString("shop.test"), "/"+name)}
	if ends != 0 {
		e.ExpiresAt = time.Unix(0, 0).Add(ends)
	}
	return e
}

func TestNamesAreThoseOfTheEntries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, held := newNames(), map[*Entry]bool{}
		var before, copied []string
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			if all := slices.Collect(maps.Keys(held)); len(all) > 0 && rapid.Bool().Draw(t, "one goes") {
				slices.SortFunc(all, func(a, b *Entry) int { return compareEntries(a, b) })
				e := rapid.SampledFrom(all).Draw(t, "which")
				n.remove(e)
				delete(held, e)
			} else {
				e := called(rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}).Draw(t, "name"), time.Duration(rapid.IntRange(0, 3).Draw(t, "ends"))*time.Hour)
				n.add(e)
				held[e] = true
			}
			if !rapid.Bool().Draw(t, "look") {
				continue
			}
			now := time.Unix(0, 0).Add(time.Duration(rapid.IntRange(0, 4).Draw(t, "now")) * time.Hour)
			want := map[string]bool{}
			for e := range held {
				if !e.Expired(now) {
					want[e.SPIFFEID.String()] = true
				}
			}
			got := n.at(now)
			if !slices.Equal(got, slices.Sorted(maps.Keys(want))) {
				t.Fatalf("%q; want %q", got, slices.Sorted(maps.Keys(want)))
			}
			if !slices.Equal(before, copied) {
				t.Fatalf("a list that was given out has become %q; it was %q", before, copied)
			}
			before, copied = got, slices.Clone(got)
		}
	})
}

// BenchmarkIdentities asks a node of many entries for its SPIFFE IDs, as each policy does;
// with churn one entry comes and goes before each question.
func BenchmarkIdentities(b *testing.B) {
	for _, churn := range []bool{false, true} {
		b.Run(fmt.Sprintf("churn=%t", churn), func(b *testing.B) {
			c := New(Options{TrustDomain: spiffeid.RequireTrustDomainFromString("shop.test"), Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
			put := func(name string) {
				c.put(b.Context(), &capb.Entry{
					EntryId: name, SpiffeId: "spiffe://shop.test/" + name, ParentId: "spiffe://shop.test/agent/n1", Revision: 1,
					Selectors: []*capb.Selector{{Type: "unix", Value: "path:/opt/" + name}},
				})
			}
			for i := range 100_000 {
				put(fmt.Sprint("w", i))
			}
			c.Identities(time.Now())
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if churn && i%2 == 0 {
					put("passing")
				} else if churn {
					c.remove("passing")
				}
				c.Identities(time.Now())
			}
		})
	}
}

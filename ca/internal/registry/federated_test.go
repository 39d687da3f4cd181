// Which trust bundles of other trust domains a node is told of.

package registry

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

func federatedEvent(t fataler, td spiffeid.TrustDomain, sequence int) store.Event {
	t.Helper()
	op, err := (&trust.Federated{TrustDomain: td, JWKS: fmt.Appendf(nil, `{"spiffe_sequence":%d,"keys":[]}`, sequence)}).Put()
	if err != nil {
		t.Fatal(err)
	}
	return store.Event{KV: store.KV{Key: op.Key, Value: op.Value}}
}

func federating(parent spiffeid.ID, with ...string) *entry.Entry {
	e := below(parent)
	e.FederatesWith = with
	return e
}

// told are the trust bundles of an update, nil where it does not speak of them.
func told(u Update) []string {
	if !u.FederatedChanged {
		return nil
	}
	out := []string{}
	for _, b := range u.Federated {
		out = append(out, fmt.Sprintf("%s %d", b.TrustDomain.Name(), b.Sequence))
	}
	return out
}

func wantTold(t *testing.T, when string, f *Feed, want []string) {
	t.Helper()
	u, _ := take(f)
	if got := told(u); !slices.Equal(got, want) || (got == nil) != (want == nil) {
		t.Errorf("%s: told of %q; want %q", when, got, want)
	}
}

func TestNodeIsToldOfItsOwnFederationsOnly(t *testing.T) {
	b := newBatches(t)
	one, two := partners[0], partners[1]
	b.apply(putEvent(t, below(nodeA)), federatedEvent(t, one, 1), federatedEvent(t, two, 1))
	onA, onB := subscribe(t, b.r, nodeA, 0), subscribe(t, b.r, nodeB, 0)
	wantTold(t, "no entry federates", onA, []string{})
	wantTold(t, "no entry at all", onB, []string{})

	web := federating(nodeA, "one.test", "none.test")
	b.apply(putEvent(t, web))
	wantTold(t, "an entry federates", onA, []string{"one.test 1"})
	wantTold(t, "another node", onB, nil)

	b.apply(federatedEvent(t, two, 2))
	wantTold(t, "another trust domain changed", onA, nil)
	b.apply(federatedEvent(t, one, 2))
	wantTold(t, "it changed", onA, []string{"one.test 2"})
	wantTold(t, "another node", onB, nil)

	b.apply(federatedEvent(t, spiffeid.RequireTrustDomainFromString("none.test"), 5))
	wantTold(t, "what was waited for came", onA, []string{"none.test 5", "one.test 2"})
	b.apply(deleteEvent(trust.FederatedPrefix + "one.test"))
	wantTold(t, "it was removed", onA, []string{"none.test 5"})
	more := federating(nodeA, "none.test", "two.test")
	b.apply(putEvent(t, more))
	wantTold(t, "another entry", onA, []string{"none.test 5", "two.test 2"})
	b.apply(deleteEvent(EntryPrefix + web.ID))
	wantTold(t, "nothing changed by that", onA, nil)
	b.apply(deleteEvent(EntryPrefix + more.ID))
	wantTold(t, "no entry federates any more", onA, []string{})
}

// What a stream missed while it was away need not be known: it is told of all at
// its beginning.
func TestResumedStreamIsToldOfEveryFederation(t *testing.T) {
	b := newBatches(t)
	b.apply(putEvent(t, federating(nodeA, "one.test", "two.test")), federatedEvent(t, partners[0], 1), federatedEvent(t, partners[1], 1))
	f := subscribe(t, b.r, nodeA, 0)
	wantTold(t, "first", f, []string{"one.test 1", "two.test 1"})
	resume := b.at
	f.Close()
	b.apply(deleteEvent(trust.FederatedPrefix + "one.test"))
	f = subscribe(t, b.r, nodeA, resume)
	if u, _ := take(f); u.Reset || !slices.Equal(told(u), []string{"two.test 1"}) {
		t.Errorf("resumed: reset %t, told of %q; want a resumption that says what is left", u.Reset, told(u))
	}
}

// The record that cannot be read vouches for nobody, and the CA goes on.
func TestDamagedFederationIsLeftOut(t *testing.T) {
	b := newBatches(t)
	b.apply(putEvent(t, federating(nodeA, "one.test")), federatedEvent(t, partners[0], 1))
	f := subscribe(t, b.r, nodeA, 0)
	wantTold(t, "first", f, []string{"one.test 1"})
	b.apply(store.Event{KV: store.KV{Key: trust.FederatedPrefix + "one.test", Value: []byte("{}")}})
	wantTold(t, "damaged", f, []string{})
}

// Whatever changes: what a stream was told last is what its node's entries federate
// with, as far as there are trust bundles.
func TestStreamsKnowTheirFederations(t *testing.T) {
	domains := []string{"one.test", "two.test", "three.test"}
	rapid.Check(t, func(rt *rapid.T) {
		b := newBatches(t)
		b.apply(agentEvent(rt, nodeA, 7, prod), agentEvent(rt, nodeB, 8, lab))
		feeds := map[spiffeid.ID]*Feed{nodeA: subscribe(t, b.r, nodeA, 0), nodeB: subscribe(t, b.r, nodeB, 0)}
		knows := map[spiffeid.ID][]string{}
		entries, bundles := map[string]*entry.Entry{}, map[string]int{}
		alias, aliased := aliasEntry(aliasX, prod), false
		for step := range rapid.IntRange(1, 25).Draw(rt, "steps") {
			switch rapid.IntRange(0, 5).Draw(rt, "kind") {
			case 0, 1:
				e := federating(rapid.SampledFrom([]spiffeid.ID{nodeA, nodeB, aliasX}).Draw(rt, "parent"),
					rapid.SliceOfNDistinct(rapid.SampledFrom(domains), 0, 3, rapid.ID[string]).Draw(rt, "with")...)
				if len(entries) > 0 && rapid.Bool().Draw(rt, "again") {
					e.ID = rapid.SampledFrom(slices.Sorted(maps.Keys(entries))).Draw(rt, "which")
				}
				entries[e.ID] = e
				b.apply(putEvent(rt, e))
			case 2:
				if len(entries) > 0 {
					id := rapid.SampledFrom(slices.Sorted(maps.Keys(entries))).Draw(rt, "which")
					delete(entries, id)
					b.apply(deleteEvent(EntryPrefix + id))
				}
			case 3:
				td := rapid.SampledFrom(domains).Draw(rt, "domain")
				bundles[td] = step + 1
				b.apply(federatedEvent(rt, spiffeid.RequireTrustDomainFromString(td), step+1))
			case 4:
				td := rapid.SampledFrom(domains).Draw(rt, "domain")
				delete(bundles, td)
				b.apply(deleteEvent(trust.FederatedPrefix + td))
			case 5:
				if aliased = !aliased; aliased {
					b.apply(putEvent(rt, alias))
				} else {
					b.apply(deleteEvent(EntryPrefix + alias.ID))
				}
			}
			for _, node := range parents {
				f := feeds[node]
				if rapid.IntRange(0, 2).Draw(rt, "lags") == 0 {
					continue
				}
				if u, _ := take(f); u.FederatedChanged {
					knows[node] = told(u)
				}
				want := []string{}
				for _, td := range slices.Sorted(maps.Keys(bundles)) {
					for _, e := range entries {
						mine := e.ParentID == node || e.ParentID == aliasX && aliased && node == nodeA
						if mine && slices.Contains(e.FederatesWith, td) {
							want = append(want, fmt.Sprintf("%s %d", td, bundles[td]))
							break
						}
					}
				}
				if !slices.Equal(knows[node], want) {
					rt.Fatalf("%s knows %q; want %q", node, knows[node], want)
				}
			}
		}
	})
}

func BenchmarkTakeWithFederations(b *testing.B) {
	bb := newBatches(b)
	events := []store.Event{putEvent(b, federating(nodeA, "p0.test"))}
	for i := range 100 {
		events = append(events, federatedEvent(b, spiffeid.RequireTrustDomainFromString(fmt.Sprintf("p%d.test", i)), 1))
	}
	bb.apply(events...)
	f := subscribe(b, bb.r, nodeA, 0)
	take(f)
	e := putEvent(b, below(nodeA))
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		bb.apply(e)
		b.StartTimer()
		take(f)
	}
}

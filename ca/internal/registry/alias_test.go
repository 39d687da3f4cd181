// Aliases: whatever changes, and in which order, each stream holds what hangs
// below its agent and below the aliases of its node, and nothing else.

package registry

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

var (
	aliasX = spiffeid.RequireFromPath(td, "/agent/alias/x")
	aliasY = spiffeid.RequireFromPath(td, "/agent/alias/y")

	prod, lab = entry.Selector{Type: "k8s", Value: "cluster:prod"}, entry.Selector{Type: "k8s", Value: "cluster:lab"}
	worker    = entry.Selector{Type: "k8s", Value: "node-name:worker"}
)

func aliasEntry(alias spiffeid.ID, selectors ...entry.Selector) *entry.Entry {
	return &entry.Entry{ID: entry.NewID(), SPIFFEID: alias, ParentID: entry.CAID(td), Selectors: selectors}
}

func below(parent spiffeid.ID) *entry.Entry {
	return &entry.Entry{
		ID: entry.NewID(), SPIFFEID: spiffeid.RequireFromPath(td, "/web"), ParentID: parent,
		Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}},
	}
}

// batches applies what a store would send, one revision after the other.
type batches struct {
	t  testing.TB
	r  *Registry
	at uint64
}

func newBatches(t testing.TB) *batches {
	return &batches{t: t, r: newRegistry(nil, slog.New(slog.DiscardHandler), &picture{revision: 1}), at: 1}
}

type fataler interface {
	Helper()
	Fatal(args ...any)
}

func (b *batches) apply(events ...store.Event) {
	b.t.Helper()
	b.at++
	for i := range events {
		events[i].KV.ModRevision = b.at
	}
	if err := b.r.apply(b.t.Context(), store.Batch{Revision: b.at, Events: events}); err != nil {
		b.t.Fatal(err)
	}
}

func putEvent(t fataler, e *entry.Entry) store.Event {
	t.Helper()
	value, err := entry.Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	return store.Event{KV: store.KV{Key: EntryPrefix + e.ID, Value: value}}
}

func deleteEvent(key string) store.Event { return store.Event{KV: store.KV{Key: key}, Delete: true} }

func agentEvent(t fataler, id spiffeid.ID, handle uint64, selectors ...entry.Selector) store.Event {
	t.Helper()
	texts := []string{}
	for _, sel := range selectors {
		texts = append(texts, sel.String())
	}
	value, err := json.Marshal(map[string]any{"v": 1, "spiffe_id": id, "handle": handle, "attestation": "k8s", "selectors": texts})
	if err != nil {
		t.Fatal(err)
	}
	name, _ := entry.AgentName(id)
	return store.Event{KV: store.KV{Key: attest.AgentPrefix + name, Value: value}}
}

// take returns what the feed tells, by ID.
func take(f *Feed) (u Update, told []string) {
	select {
	case <-f.Due():
	default:
	}
	u = f.Take(time.Now())
	return u, ids(u.Entries)
}

func TestAliasThatAppearsAndGoesIsPushed(t *testing.T) {
	b := newBatches(t)
	web := below(aliasX)
	b.apply(agentEvent(t, nodeA, 7, prod, worker), agentEvent(t, nodeB, 8, lab), putEvent(t, web))
	onA, onB := subscribe(t, b.r, nodeA, 0), subscribe(t, b.r, nodeB, 0)
	if _, told := take(onA); len(told) != 0 {
		t.Fatalf("before there is an alias the node is told of %v", told)
	}
	take(onB)

	made := aliasEntry(aliasX, prod, worker)
	b.apply(putEvent(t, made))
	if u, told := take(onA); u.Reset || !slices.Equal(told, []string{web.ID}) {
		t.Errorf("the alias appears: update %+v; want the entry below it and no listing", u)
	}
	orders := below(aliasX)
	b.apply(putEvent(t, orders))
	if u, told := take(onA); u.Reset || !slices.Equal(told, []string{orders.ID}) {
		t.Errorf("an entry below the alias: update %+v; want it alone", u)
	}
	select {
	case <-onB.Due():
		t.Error("a node that the alias does not stand for was woken")
	default:
	}
	peer := &svid.Peer{ID: nodeA}
	for e, want := range map[*entry.Entry]bool{web: true, made: false} {
		g := b.r.Grounds(peer, e.ID)
		if got := g.Concerns(g.Entries[0], time.Now()); got != want {
			t.Errorf("Concerns(%s) = %v; want %v", e.SPIFFEID, got, want)
		}
	}
	if g := b.r.Grounds(&svid.Peer{ID: nodeB}, web.ID); g.Concerns(g.Entries[0], time.Now()) || g.Count() != 0 {
		t.Errorf("another node may have SVIDs for an entry below the alias, or has %d entries", g.Count())
	}
	if g := b.r.Grounds(peer); g.Count() != 2 {
		t.Errorf("%d entries concern the node; want the two below its alias", g.Count())
	}

	// It is made by two entries now; one of them is not enough to take it away.
	again := aliasEntry(aliasX, prod)
	b.apply(putEvent(t, again))
	b.apply(deleteEvent(EntryPrefix + made.ID))
	if u, told := take(onA); len(told)+len(u.Removed) != 0 {
		t.Errorf("one of two entries of the alias went: update %+v; want nothing", u)
	}
	b.apply(deleteEvent(EntryPrefix + again.ID))
	if u, _ := take(onA); u.Reset || !slices.Equal(u.Removed, sorted(web.ID, orders.ID)) {
		t.Errorf("the alias goes: update %+v; want both entries removed", u)
	}
	if g := b.r.Grounds(peer, web.ID); g.Concerns(g.Entries[0], time.Now()) {
		t.Error("the node may have SVIDs for an entry below an alias that it has no more")
	}
}

func sorted(ids ...string) []string { return slices.Sorted(slices.Values(ids)) }

func TestNodeOfWhichSomethingElseIsProvedHasOtherAliases(t *testing.T) {
	b := newBatches(t)
	x, y := below(aliasX), below(aliasY)
	b.apply(putEvent(t, aliasEntry(aliasX, prod)), putEvent(t, aliasEntry(aliasY, lab)), putEvent(t, x), putEvent(t, y), agentEvent(t, nodeA, 7, prod))
	f := subscribe(t, b.r, nodeA, 0)
	if _, told := take(f); !slices.Equal(told, []string{x.ID}) {
		t.Fatalf("told of %v; want the entry below the one alias", told)
	}
	b.apply(agentEvent(t, nodeA, 7, lab))
	if u, told := take(f); !slices.Equal(told, []string{y.ID}) || !slices.Equal(u.Removed, []string{x.ID}) {
		t.Errorf("the node moved to another cluster: update %+v", u)
	}
	b.apply(agentEvent(t, nodeA, 7, lab))
	if u, told := take(f); len(told)+len(u.Removed) > 0 {
		t.Errorf("nothing else is proved: update %+v", u)
	}
}

func TestExpiredAliasGivesNothing(t *testing.T) {
	b := newBatches(t)
	made, web := aliasEntry(aliasX, prod), below(aliasX)
	made.ExpiresAt = time.Now().Add(time.Hour)
	b.apply(putEvent(t, made), putEvent(t, web), agentEvent(t, nodeA, 7, prod))
	g := b.r.Grounds(&svid.Peer{ID: nodeA}, web.ID)
	if !g.Concerns(g.Entries[0], time.Now()) || g.Concerns(g.Entries[0], made.ExpiresAt) {
		t.Error("an alias holds otherwise than until its entry expires")
	}
}

// The model: what each node is to hold, looked up from scratch.
type model struct {
	entries map[string]*entry.Entry
	nodes   map[spiffeid.ID][]entry.Selector
}

func (m *model) held(node spiffeid.ID) []string {
	parents := []spiffeid.ID{node}
	for _, e := range m.entries {
		if e.StandsFor(m.nodes[node]) {
			parents = append(parents, e.SPIFFEID)
		}
	}
	var held []string
	for id, e := range m.entries {
		if slices.Contains(parents, e.ParentID) {
			held = append(held, id)
		}
	}
	slices.Sort(held)
	return held
}

// change draws one change of the model, as events.
func (m *model) change(t *rapid.T) store.Event {
	node := rapid.SampledFrom([]spiffeid.ID{nodeA, nodeB})
	facts := rapid.SliceOfNDistinct(rapid.SampledFrom([]entry.Selector{prod, lab, worker}), 1, 2, rapid.ID)
	known := slices.Sorted(maps.Keys(m.entries))
	switch what := rapid.IntRange(0, 3).Draw(t, "what"); {
	case what == 0 && len(known) > 0:
		id := rapid.SampledFrom(known).Draw(t, "gone")
		delete(m.entries, id)
		return deleteEvent(EntryPrefix + id)
	case what == 1:
		at, selectors := node.Draw(t, "node"), facts.Draw(t, "proved")
		m.nodes[at] = selectors
		return agentEvent(t, at, uint64(len(at.String()))+uint64(at.Path()[7]), selectors...)
	case what == 2:
		e := aliasEntry(rapid.SampledFrom([]spiffeid.ID{aliasX, aliasY}).Draw(t, "alias"), facts.Draw(t, "selectors")...)
		m.entries[e.ID] = e
		return putEvent(t, e)
	default:
		e := below(rapid.SampledFrom([]spiffeid.ID{nodeA, nodeB, aliasX, aliasY}).Draw(t, "parent"))
		m.entries[e.ID] = e
		return putEvent(t, e)
	}
}

func TestStreamsHoldWhatConcernsTheirNodes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		b := newBatches(t)
		m := &model{entries: map[string]*entry.Entry{}, nodes: map[spiffeid.ID][]entry.Selector{}}
		type client struct {
			feed *Feed
			held map[string]bool
			at   uint64
		}
		clients := map[spiffeid.ID]*client{}
		connect := func(node spiffeid.ID, resume uint64) *Feed {
			f, err := b.r.Subscribe(t.Context(), node, resume)
			if err != nil {
				rt.Fatal(err)
			}
			return f
		}
		nodes := []spiffeid.ID{nodeA, nodeB}
		for _, node := range nodes {
			clients[node] = &client{connect(node, 0), map[string]bool{}, 0}
		}
		for range rapid.IntRange(1, 25).Draw(rt, "steps") {
			var events []store.Event
			for range rapid.IntRange(1, 3).Draw(rt, "changes") {
				ev := m.change(rt)
				if !slices.ContainsFunc(events, func(e store.Event) bool { return e.KV.Key == ev.KV.Key }) {
					events = append(events, ev)
				} else { // one key once in a transaction
					b.apply(events...)
					events = []store.Event{ev}
				}
			}
			b.apply(events...)
			node := rapid.SampledFrom(nodes).Draw(rt, "who looks")
			c := clients[node]
			if rapid.Bool().Draw(rt, "anew") {
				c.feed.Close()
				c.feed = connect(node, c.at)
			}
			u := c.feed.Take(time.Now())
			if c.at = u.Revision; u.Reset {
				clear(c.held)
			}
			for _, e := range u.Entries {
				c.held[e.ID] = true
			}
			for _, id := range u.Removed {
				delete(c.held, id)
			}
			if got, want := slices.Sorted(maps.Keys(c.held)), m.held(node); !slices.Equal(got, want) {
				rt.Fatalf("%s holds %v; want %v", node, got, want)
			}
		}
		for _, c := range clients {
			c.feed.Close()
		}
		if len(b.r.feeds.byAlias) != 0 {
			rt.Fatalf("closed streams are remembered by %d aliases", len(b.r.feeds.byAlias))
		}
	})
}

// What an alias entry costs where many streams are open.
func BenchmarkAliasAppears(b *testing.B) {
	batches := newBatches(b)
	const streams = 10_000
	for i := range streams {
		id := spiffeid.RequireFromPath(td, fmt.Sprintf("/agent/k8s/prod/n%d", i))
		batches.apply(agentEvent(b, id, uint64(i+1), prod, entry.Selector{Type: "k8s", Value: fmt.Sprintf("node-name:n%d", i)}))
		f, err := batches.r.Subscribe(b.Context(), id, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
	}
	one := entry.Selector{Type: "k8s", Value: "node-name:n7"}
	b.ReportAllocs()
	for b.Loop() {
		e := aliasEntry(aliasX, one)
		batches.apply(putEvent(b, e))
		batches.apply(deleteEvent(EntryPrefix + e.ID))
	}
}

func TestMarkFindsWhatTheNodesEntriesGive(t *testing.T) {
	b := newBatches(t)
	one, two := spiffeid.RequireFromPath(td, "/agent/one"), spiffeid.RequireFromPath(td, "/agent/two")
	for parent, path := range map[spiffeid.ID]string{one: "/of-one", two: "/of-two"} {
		e := below(parent)
		e.SPIFFEID = spiffeid.RequireFromPath(td, path)
		b.apply(putEvent(t, e))
	}
	id := func(path string) string { return spiffeid.RequireFromPath(td, path).String() }
	asked := map[string]bool{id("/of-one"): false, id("/of-two"): false, id("/nobody"): false, "": false}
	b.r.Mark(one, asked)
	if want := map[string]bool{id("/of-one"): true, id("/of-two"): false, id("/nobody"): false, "": false}; !maps.Equal(asked, want) {
		t.Errorf("%v; want %v", asked, want)
	}
}

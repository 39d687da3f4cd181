// The picture after any sequence of changes is the one that a listing gives,
// and one that a reader holds does not change.

package registry

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

var (
	noon    = time.Date(2030, 1, 2, 12, 0, 0, 0, time.UTC)
	parents = []spiffeid.ID{nodeA, nodeB}
	names   = []string{"/web", "/db", "/admin"}

	partners = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("one.test"), spiffeid.RequireTrustDomainFromString("two.test")}
)

// encoded is the store's form of an entry.
func encoded(t testing.TB, e *entry.Entry) store.Op {
	t.Helper()
	value, err := entry.Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	return store.Put(EntryPrefix+e.ID, value)
}

// genOp is one change of one of few keys, so that they meet.
func genOp(t *testing.T) *rapid.Generator[store.Op] {
	return rapid.Custom(func(rt *rapid.T) store.Op {
		n := rapid.IntRange(0, 30).Draw(rt, "n")
		id := fmt.Sprintf("%032x", n)
		op := store.Op{}
		switch rapid.IntRange(0, 12).Draw(rt, "kind") {
		case 0:
			op = store.Put(attest.AgentPrefix+"a", []byte(`{"v":1,"spiffe_id":"`+nodeA.String()+`","handle":7}`))
		case 1:
			op = store.Put(release.HeadPrefix+"main", fmt.Appendf(nil, `{"v":1,"generation":%d}`, n))
		case 2:
			put, err := (&replica.Record{Name: "b", Authorities: []replica.Authority{{ID: "0a", NotAfter: noon}}}).Put()
			if err != nil {
				t.Fatal(err)
			}
			op = put
		case 3:
			expires := noon.Add(time.Duration(n-15) * time.Hour)
			put, _, err := revocation.Put(0, svid.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, rapid.SampledFrom(names).Draw(rt, "name")).String(), ExpiresAt: expires})
			if err != nil {
				t.Fatal(err)
			}
			op = store.Put(revocation.Prefix+id, put.Value)
		case 4:
			return replica.Mark()
		case 5:
			op = store.Put(trust.Key, fmt.Appendf(nil, `{"v":1,"trust_domain":"shop.test","sequence":%d,"jwks":{"keys":[]}}`, n+1))
		case 6:
			b := &trust.Federated{TrustDomain: rapid.SampledFrom(partners).Draw(rt, "partner"), JWKS: fmt.Appendf(nil, `{"spiffe_sequence":%d,"keys":[]}`, n)}
			put, err := b.Put()
			if err != nil {
				t.Fatal(err)
			}
			op = put
		default:
			e := &entry.Entry{
				ID: id, ParentID: rapid.SampledFrom(parents).Draw(rt, "parent"),
				SPIFFEID:  spiffeid.RequireFromPath(td, rapid.SampledFrom(names).Draw(rt, "name")),
				Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}, Role: rapid.SampledFrom(someRoles).Draw(rt, "role"),
				FederatesWith: rapid.SliceOfNDistinct(rapid.SampledFrom([]string{"one.test", "two.test", "none.test"}), 0, 3, rapid.ID[string]).Draw(rt, "federates with"),
			}
			if rapid.Bool().Draw(rt, "expires") {
				e.ExpiresAt = noon.Add(time.Duration(n-15) * time.Second)
			}
			op = encoded(t, e)
		}
		op.Delete = rapid.IntRange(0, 2).Draw(rt, "delete") == 0
		// Rubbish in the place of what may be left out.
		mayBe := strings.HasPrefix(op.Key, EntryPrefix) || strings.HasPrefix(op.Key, attest.AgentPrefix) || strings.HasPrefix(op.Key, replica.Prefix) || strings.HasPrefix(op.Key, trust.FederatedPrefix)
		if !op.Delete && mayBe && rapid.IntRange(0, 9).Draw(rt, "rubbish") == 0 {
			op.Value = []byte("{}")
		}
		return op
	})
}

var someRoles = []role.Role{{}, {}, {Name: role.Operator}, {Name: role.Registrar, Prefix: "/ns/a"}, {Name: role.Registrar, Prefix: "/ns/b"}}

// dump writes a picture down: each tree in its own order.
func dump(p *picture) []string {
	out := []string{fmt.Sprint("revision ", p.revision, " keys ", p.replicas.keysAt, " revocations ", p.revocations.Len())}
	for name, tree := range map[string]index.Tree[*entry.Entry]{
		"id": p.entries.byID, "parent": p.entries.byParent, "name": p.entries.bySPIFFEID, "expiry": p.entries.byExpiry, "role": p.entries.roles,
		"federation": p.entries.federating,
	} {
		for k, e := range tree.All() {
			out = append(out, fmt.Sprintf("%s %x %+v", name, k, *e))
		}
	}
	for _, a := range p.agents.All() {
		out = append(out, fmt.Sprintf("agent %+v", *a))
	}
	for _, r := range p.revocations.After(0, time.Time{}) {
		out = append(out, fmt.Sprint("revocation ", r.Key, r.Revocation, r.CreatedAt, r.Revision, r.Imported, r.Derived))
	}
	if p.trust != nil {
		out = append(out, fmt.Sprint("trust ", p.trust.Sequence, p.trust.Revision))
	}
	for _, b := range p.federated.inOrder() {
		out = append(out, fmt.Sprint("federated ", b.TrustDomain, b.Sequence, b.Revision))
	}
	for _, h := range p.heads {
		out = append(out, fmt.Sprintf("head %+v", *h))
	}
	for _, r := range p.replicas.byName {
		out = append(out, fmt.Sprintf("replica %+v", *r))
	}
	slices.Sort(out)
	return out
}

func TestPictureIsWhatAListingGives(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	rapid.Check(t, func(rt *rapid.T) {
		ops := rapid.SliceOfN(genOp(t), 1, 40).Draw(rt, "changes")
		half := rapid.IntRange(0, len(ops)).Draw(rt, "half")
		clearStore(t, st, r)
		var old *picture
		var before []string
		for i, op := range ops {
			if i == half {
				old = r.pic.Load()
				before = dump(old)
			}
			write(t, st, r, op)
		}
		now := *r.pic.Load()
		fresh, _, err := list(t.Context(), st)
		if err != nil {
			rt.Fatal(err)
		}
		now.revision = fresh.revision // deletes of what is not there do not reach a watch
		if d := cmp.Diff(dump(fresh), dump(&now)); d != "" {
			rt.Fatalf("the picture differs from a listing (-listed +picture):\n%s", d)
		}
		if old != nil {
			if d := cmp.Diff(before, dump(old)); d != "" {
				rt.Fatalf("an older picture has changed (-before +after):\n%s", d)
			}
		}
		lookUp(rt, r)
	})
}

func clearStore(t testing.TB, st store.Store, r *Registry) {
	t.Helper()
	kvs, _, _, err := st.List(t.Context(), "", "", 100, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ops []store.Op
	for _, kv := range kvs {
		if kv.Key != replica.MarkKey { // nobody takes it away
			ops = append(ops, store.Delete(kv.Key))
		}
	}
	write(t, st, r, ops...)
}

// lookUp asks what the indexes answer, and compares with a walk over all.
func lookUp(rt *rapid.T, r *Registry) {
	var all []*entry.Entry
	for _, e := range r.pic.Load().entries.byID.All() {
		all = append(all, e)
	}
	filter := Filter{
		ParentID: rapid.SampledFrom([]string{"", nodeA.String(), nodeB.String(), "x"}).Draw(rt, "by parent"),
		SPIFFEID: rapid.SampledFrom([]string{"", "spiffe://shop.test/web", "spiffe://shop.test/none"}).Draw(rt, "by name"),
	}
	if rapid.Bool().Draw(rt, "only some") {
		filter.Only = func(e *entry.Entry) bool { return e.ID[31]%2 == 0 }
	}
	var want, got, expired []string
	for _, e := range all {
		if (filter.Only == nil || filter.Only(e)) && (filter.ParentID == "" || filter.ParentID == e.ParentID.String()) && (filter.SPIFFEID == "" || filter.SPIFFEID == e.SPIFFEID.String()) {
			want = append(want, e.ID)
		}
		if e.Expired(noon) {
			expired = append(expired, e.ID)
		}
	}
	limit := rapid.IntRange(1, 5).Draw(rt, "limit")
	for after, more := "", true; more; {
		var page []*entry.Entry
		page, more = r.Entries(filter, after, limit)
		if len(page) > limit || more && len(page) < limit {
			rt.Fatalf("a page of %d has %d entries, more=%t", limit, len(page), more)
		}
		for _, e := range page {
			got = append(got, e.ID)
			after = e.ID
		}
	}
	if !slices.Equal(got, want) {
		rt.Fatalf("Entries(%s, %s, %t) = %v; want %v", filter.ParentID, filter.SPIFFEID, filter.Only != nil, got, want)
	}
	if got := ids(r.ExpiredEntries(noon)); !slices.Equal(got, expired) {
		rt.Fatalf("ExpiredEntries = %v; want %v", got, expired)
	}
	for _, name := range names {
		id := spiffeid.RequireFromPath(td, name)
		var given []role.Role
		for _, e := range all {
			if e.SPIFFEID == id && !e.Expired(noon) {
				given = append(given, e.Role)
			}
		}
		slices.SortFunc(given, func(a, b role.Role) int { return strings.Compare(a.String(), b.String()) })
		var want role.Role
		if given = slices.Compact(given); len(given) == 1 {
			want = given[0]
		}
		if got := r.Role(id, noon); got != want {
			rt.Fatalf("Role(%s) = %s; want %s", id, got, want)
		}
	}
}

// Nobody has anything of what cannot be read, and the node is told.
func TestUnreadableGrantsAreLeftOut(t *testing.T) {
	st := openStore(t)
	var logged bytes.Buffer
	r, err := Open(t.Context(), st, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	run(t, r)
	e := put(t, st, r, nodeA)
	agent := store.Put(attest.AgentPrefix+"a", []byte(`{"v":1,"spiffe_id":"`+nodeA.String()+`","handle":7}`))
	write(t, st, r, agent)
	f := subscribe(t, r, nodeA, 0)
	f.Take(noon)
	other := encoded(t, &entry.Entry{ID: e.ID, ParentID: nodeA, SPIFFEID: e.SPIFFEID, Selectors: e.Selectors})
	for name, op := range map[string]store.Op{
		"an entry":                  store.Put(EntryPrefix+e.ID, []byte("{}")),
		"an agent":                  store.Put(agent.Key, []byte("{}")),
		"another agent's record":    store.Put(attest.AgentPrefix+"b", agent.Value),
		"a replica":                 store.Put(replica.Prefix+"b", []byte("{}")),
		"another entry's record":    store.Put(EntryPrefix+entry.NewID(), other.Value),
		"an entry without a number": store.Put(EntryPrefix+"x", other.Value),
	} {
		logged.Reset()
		write(t, st, r, op)
		if !strings.Contains(logged.String(), op.Key) {
			t.Errorf("%s: the log says %q; want the key %s", name, logged.String(), op.Key)
		}
	}
	if u := f.Take(noon); !slices.Equal(u.Removed, []string{e.ID}) {
		t.Errorf("update = %+v; want the entry removed", u)
	}
	if n, agents, _, _ := r.Counts(); n+agents+len(r.Replicas()) != 0 {
		t.Errorf("%d entries, %d agents, %d replicas are left; want none", n, agents, len(r.Replicas()))
	}
	logged.Reset()
	if _, err := Open(t.Context(), st, slog.New(slog.NewTextHandler(&logged, nil))); err != nil || strings.Count(logged.String(), "left out") != 6 {
		t.Errorf("Open: %v; want six records left out, logged:\n%s", err, logged.String())
	}
}

// Were it left out, agents would be told that good entries are gone.
func TestEntryOfANewerMerlonEndsTheRegistry(t *testing.T) {
	st := openStore(t)
	r, err := Open(t.Context(), st, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.Run(t.Context()) }()
	op := encoded(t, &entry.Entry{ID: entry.NewID(), ParentID: nodeA, SPIFFEID: nodeB, Selectors: []entry.Selector{{Type: "unix", Value: "uid:1"}}})
	op.Value = bytes.Replace(op.Value, []byte(`"v":1`), []byte(`"v":3`), 1)
	if _, err := st.Txn(t.Context(), nil, []store.Op{op}, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("Run ended without an error")
	}
	if _, err := Open(t.Context(), st, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("Open took it")
	}
}

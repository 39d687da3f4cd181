// Who counts for a step of an authority, by what the store says.

package registry

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

var defaults = Viewer{X509SVID: time.Hour, JWTSVID: 5 * time.Minute}

// agentRecord is what the store holds of an agent.
func agentRecord(t *testing.T, notAfter time.Time, sequence, attested uint64) store.Op {
	t.Helper()
	b, err := json.Marshal(map[string]any{
		"v": 1, "spiffe_id": nodeA, "handle": 7, "attestation": "join_token", "attested_at": notAfter.Add(-time.Hour), "not_after": notAfter,
		"trust_sequence": sequence, "attested_revision": attested,
	})
	if err != nil {
		t.Fatal(err)
	}
	return store.Put(attest.AgentPrefix+"a", b)
}

func counted(t *testing.T, r *Registry, now time.Time) rotation.Agent {
	t.Helper()
	_, view := r.Rotation(now, defaults)
	if len(view.Agents) != 1 || view.Agents[0].Name != nodeA.String() {
		t.Fatalf("agents = %+v; want %s", view.Agents, nodeA)
	}
	return view.Agents[0]
}

func TestAgentCountsUntilItsLastSVIDHasExpired(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	end := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	write(t, st, r, agentRecord(t, end, 5, 0))
	if a := counted(t, r, end.Add(time.Second)); !a.Until.Equal(end) || a.Sequence != 5 {
		t.Errorf("an agent without entries counts until %s with sequence %d; want %s and 5", a.Until, a.Sequence, end)
	}
	put(t, st, r, nodeB)
	put(t, st, r, nodeA) // of the default TTL
	if a := counted(t, r, end.Add(time.Second)); !a.Until.Equal(end.Add(time.Hour)) {
		t.Errorf("it counts until %s; want an hour after its own SVID", a.Until)
	}
	e := &entry.Entry{
		ID: entry.NewID(), SPIFFEID: spiffeid.RequireFromPath(td, "/batch"), ParentID: nodeA, X509SVIDTTL: 8 * time.Hour,
		Selectors: []entry.Selector{{Type: "unix", Value: "uid:2"}},
	}
	value, err := entry.Encode(e)
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, store.Put(EntryPrefix+e.ID, value))
	if a := counted(t, r, end.Add(time.Second)); !a.Until.Equal(end.Add(8 * time.Hour)) {
		t.Errorf("it counts until %s; want the longest TTL of its entries after its own SVID", a.Until)
	}
}

// Whichever lives longest counts: an entry's TTLs, or the CA's where it has none.
func TestAgentCountsForItsJWTSVIDsToo(t *testing.T) {
	for name, test := range map[string]struct {
		x509, jwt time.Duration // of the entry
		defaults  Viewer
		want      time.Duration
	}{
		"the entry's JWT TTL":     {x509: time.Minute, jwt: 30 * time.Minute, defaults: defaults, want: 30 * time.Minute},
		"the entry's X.509 TTL":   {x509: 2 * time.Hour, jwt: 30 * time.Minute, defaults: defaults, want: 2 * time.Hour},
		"the default JWT TTL":     {x509: time.Minute, defaults: defaults, want: 5 * time.Minute},
		"the default X.509 TTL":   {jwt: time.Minute, defaults: defaults, want: time.Hour},
		"both defaults":           {defaults: Viewer{X509SVID: time.Minute, JWTSVID: time.Hour}, want: time.Hour},
		"the entry's are shorter": {x509: time.Minute, jwt: 2 * time.Minute, defaults: defaults, want: 2 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			st := openStore(t)
			r := start(t, st)
			end := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
			e := &entry.Entry{
				ID: entry.NewID(), SPIFFEID: spiffeid.RequireFromPath(td, "/batch"), ParentID: nodeA, X509SVIDTTL: test.x509, JWTSVIDTTL: test.jwt,
				Selectors: []entry.Selector{{Type: "unix", Value: "uid:2"}},
			}
			value, err := entry.Encode(e)
			if err != nil {
				t.Fatal(err)
			}
			write(t, st, r, agentRecord(t, end, 5, 0), store.Put(EntryPrefix+e.ID, value))
			_, view := r.Rotation(end.Add(time.Second), test.defaults)
			if len(view.Agents) != 1 || !view.Agents[0].Until.Equal(end.Add(test.want)) {
				t.Errorf("agents = %+v; want it to count until %s after its own SVID", view.Agents, test.want)
			}
		})
	}
}

func TestBannedAgentCountsAgainWhenItAttests(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	now := time.Now()
	attested := write(t, st, r, agentRecord(t, now.Add(time.Hour), 5, 0))
	if counted(t, r, now).Banned {
		t.Error("it is banned from the start")
	}
	ban, _, err := revocation.Put(0, svid.Revocation{AgentID: nodeA.String(), AgentHandle: 7, ExpiresAt: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, ban)
	if !counted(t, r, now).Banned {
		t.Error("it is not banned")
	}
	// Its last acknowledgement was on the way.
	write(t, st, r, agentRecord(t, now.Add(time.Hour), 6, attested))
	if !counted(t, r, now).Banned {
		t.Error("an acknowledgement took the ban away")
	}
	write(t, st, r, agentRecord(t, now.Add(time.Hour), 0, 0))
	if counted(t, r, now).Banned {
		t.Error("it has attested anew, and is still banned")
	}
}

// Another CA's agent of that name was banned there.
func TestBanBelowAnotherCABansNobodyHere(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	now := time.Now()
	write(t, st, r, agentRecord(t, now.Add(time.Hour), 5, 0))
	_, ops, err := revocation.Import(revocation.Shared{ID: "0123456789abcdef0123456789abcdef", Revocation: svid.Revocation{
		AgentID: nodeA.String(), AgentHandle: 8, Realm: 1, BeforeRevision: 900, ExpiresAt: now.Add(time.Hour),
	}}, 0, now)
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, ops...)
	if counted(t, r, now).Banned {
		t.Error("it does not count any more, and its own CA has not banned it")
	}
}

func TestAcknowledgementIsKeptWhereAStepWaitsForIt(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	now := time.Now()
	write(t, st, r, agentRecord(t, now.Add(time.Hour), 5, 0))
	if r.AckDue(nodeA, 6) || r.AckDue(nodeB, 6) {
		t.Error("nothing waits, and the acknowledgement is to be written")
	}
	key := rotation.Authority{ID: "k", Kind: rotation.JWT, Replica: "ca", PublicKey: []byte("k"), NotBefore: now, NotAfter: now.Add(time.Hour)}
	var set rotation.Set
	for _, c := range []rotation.Command{{Verb: rotation.Prepare, New: &key}, {Verb: rotation.Publish, ID: "k"}} {
		var err error
		if set, err = rotation.Step(set, c, rotation.View{}, rotation.Policy{}, now); err != nil {
			t.Fatal(err)
		}
	}
	value, err := set.Stamped(7).Encode()
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, store.Put(trust.AuthoritiesKey, value))
	for sequence, want := range map[uint64]bool{4: true, 5: false, 6: true, 7: true} {
		if got := r.AckDue(nodeA, sequence); got != want {
			t.Errorf("AckDue(%d) = %t with 5 written down, and a step that waits for 7", sequence, got)
		}
	}
	write(t, st, r, agentRecord(t, now.Add(time.Hour), 7, 0))
	if r.AckDue(nodeA, 8) {
		t.Error("nothing waits any more, and the acknowledgement is to be written")
	}
}

// Records of an older Merlon do not name the root: there was one only.
func TestIssuersNameTheirRoot(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	now := time.Now()
	root := rotation.Authority{ID: "a0", Kind: rotation.Root, Replica: "ca", Certificate: []byte("a"), NotBefore: now, NotAfter: now.Add(time.Hour)}
	set, err := rotation.Set{}.Enrolled(root, now)
	if err != nil {
		t.Fatal(err)
	}
	value, err := set.Encode()
	if err != nil {
		t.Fatal(err)
	}
	rec := &replica.Record{Name: "ca", RootHolder: true, JoinedAt: now, JWTKeyID: "k"}
	rec = rec.WithAuthority(replica.Authority{ID: "01", NotAfter: now.Add(time.Minute)}, now)
	rec = rec.WithAuthority(replica.Authority{ID: "02", Root: "b0", NotAfter: now.Add(time.Hour)}, now)
	record, err := rec.Put()
	if err != nil {
		t.Fatal(err)
	}
	write(t, st, r, store.Put(trust.AuthoritiesKey, value), record)
	_, view := r.Rotation(now, defaults)
	if len(view.Issuers) != 2 || view.Issuers[0].Root != "a0" || view.Issuers[0].Current || view.Issuers[1].Root != "b0" || !view.Issuers[1].Current {
		t.Errorf("issuers = %+v", view.Issuers)
	}
	if _, view := r.Rotation(now.Add(2*time.Minute), defaults); len(view.Issuers) != 1 {
		t.Errorf("issuers later = %+v; want the one that lives", view.Issuers)
	}
}

// A ban outlives its revocation record: there is nothing left that it can concern.
func TestBannedAgentDoesNotCountWhenItsRevocationIsGone(t *testing.T) {
	st := openStore(t)
	r := start(t, st)
	now := time.Now()
	write(t, st, r, agentRecord(t, now.Add(time.Hour), 5, 0))
	if _, err := attest.Decide(t.Context(), st, nodeA, attest.Decision{From: []attest.Standing{attest.Good}, To: attest.Banned, Now: now}); err != nil {
		t.Fatal(err)
	}
	write(t, st, r, store.Put("other/key", nil))
	if a := counted(t, r, now); !a.Banned {
		t.Errorf("counted = %+v; want it banned", a)
	}
}

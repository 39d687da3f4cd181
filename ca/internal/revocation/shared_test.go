// Records on their way between CAs: everybody comes to hold the same, and each binds
// what was issued before it, wherever that was, and nothing that came later.

package revocation

import (
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// aCA is the store of one, as far as revocations go.
type aCA struct {
	realm    uint32
	revision uint64
	records  map[string]*Record
	out      [][]Shared // what is on the way to each other CA
}

// commit writes ops in one transaction.
func (c *aCA) commit(t testing.TB, ops ...store.Op) (made []*Record) {
	t.Helper()
	c.revision++
	for _, op := range ops {
		rec, err := Decode(store.KV{Key: op.Key, Value: op.Value, ModRevision: c.revision})
		if err != nil {
			t.Fatal(err)
		}
		c.records[op.Key] = rec
		made = append(made, rec)
	}
	return made
}

// tell puts what was made on its way, as the CA above and nested ones do.
func (c *aCA) tell(made []*Record) {
	for to := range c.out {
		for _, rec := range made {
			if c.realm == 0 && to != 0 || c.realm != 0 && to == 0 && !rec.Imported {
				c.out[to] = append(c.out[to], rec.Share())
			}
		}
	}
}

func (c *aCA) set() Set {
	return newSet(slices.Collect(maps.Values(c.records)))
}

// svids are of one SPIFFE ID, each with the moment when it was issued.
func (c *aCA) issue(t testing.TB) *svid.Peer {
	t.Helper()
	serial, err := svid.NewSerial(uint64(c.realm)+5, c.revision)
	if err != nil {
		t.Fatal(err)
	}
	serial = serial.In(c.realm)
	return &svid.Peer{
		ID: spiffeid.RequireFromString("spiffe://shop.test/web"), Serial: serial, OurSerial: true, SerialHex: serial.String(),
		AuthorityIDs: []string{"aa"}, NotAfter: end,
	}
}

func TestSharedRevocationsBindWhatWasIssuedBefore(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		cas := make([]*aCA, 3)
		for i := range cas {
			cas[i] = &aCA{realm: uint32(i), revision: rapid.Uint64Range(1, 1000).Draw(rt, "begins at"), records: map[string]*Record{}, out: make([][]Shared, 3)}
		}
		deliver := func(from, to int) bool {
			queue := cas[from].out[to]
			if len(queue) == 0 {
				return false
			}
			cas[from].out[to] = queue[1:]
			if err := queue[0].Check(); err != nil {
				rt.Fatal(err)
			}
			cmp, ops, err := Import(queue[0], cas[to].realm, time.Now())
			if err != nil {
				rt.Fatal(err)
			}
			if cas[to].records[cmp.Key] == nil {
				cas[to].tell(cas[to].commit(t, ops...))
			}
			return true
		}
		var old []*svid.Peer // issued before some revocation was made
		var fresh []*svid.Peer
		revoked := 0
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			ca := cas[rapid.IntRange(0, 2).Draw(rt, "CA")]
			switch rapid.IntRange(0, 3).Draw(rt, "step") {
			case 0:
				ca.revision += rapid.Uint64Range(0, 3).Draw(rt, "other changes")
				fresh = append(fresh, ca.issue(t))
			case 1:
				op, _, err := Put(ca.realm, svid.Revocation{SPIFFEID: "spiffe://shop.test/web", ExpiresAt: end})
				if err != nil {
					rt.Fatal(err)
				}
				ca.tell(ca.commit(t, op))
				old, fresh, revoked = append(old, fresh...), nil, revoked+1
			default:
				deliver(rapid.IntRange(0, 2).Draw(rt, "from"), rapid.IntRange(0, 2).Draw(rt, "to"))
			}
		}
		for again := true; again; {
			again = false
			for from := range cas {
				for to := range cas {
					again = deliver(from, to) || again
				}
			}
		}
		for _, ca := range cas {
			if got, want := len(ca.records), revoked*len(cas); got != want {
				rt.Errorf("realm %d holds %d records after %d revocations; want one for each of %d CAs", ca.realm, got, revoked, len(cas))
			}
			set := ca.set()
			for _, p := range old {
				if _, ok := set.Concerning(p); !ok {
					rt.Errorf("realm %d: an SVID of realm %d, revision %d, is good, and was issued before a revocation", ca.realm, p.Serial.Realm, p.Serial.Revision)
				}
			}
			for _, issuer := range cas {
				if p := issuer.issue(t); revoked > 0 {
					if _, ok := set.Concerning(p); ok {
						rt.Errorf("realm %d: an SVID that realm %d issues now is revoked", ca.realm, issuer.realm)
					}
				}
			}
			for key, rec := range cas[0].records {
				if other := ca.records[key]; other == nil || other.Realm != rec.Realm || other.BeforeRevision != rec.BeforeRevision {
					rt.Errorf("realm %d holds %+v as %s; the root's CA holds %+v", ca.realm, other, key, rec)
				}
			}
		}
	})
}

func TestWhatFollowsFromASharedRevocation(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef"
	now := time.Now().UTC()
	for name, test := range map[string]struct {
		r       svid.Revocation
		derived bool
		own     uint32
		follows bool
	}{
		"SPIFFE ID, from above":      {svid.Revocation{SPIFFEID: "spiffe://shop.test/web", BeforeRevision: 9}, false, 1, true},
		"SPIFFE ID, from below":      {svid.Revocation{SPIFFEID: "spiffe://shop.test/web", BeforeRevision: 9, Realm: 1}, false, 0, true},
		"SPIFFE ID, derived":         {svid.Revocation{SPIFFEID: "spiffe://shop.test/web", BeforeRevision: 9}, true, 1, false},
		"SPIFFE ID, without a limit": {svid.Revocation{SPIFFEID: "spiffe://shop.test/web"}, false, 1, false},
		"its own, come back":         {svid.Revocation{SPIFFEID: "spiffe://shop.test/web", BeforeRevision: 9, Realm: 1}, false, 1, false},
		"authority, from above":      {svid.Revocation{AuthorityID: "ab", BeforeRevision: 9}, false, 1, true},
		"authority, from below":      {svid.Revocation{AuthorityID: "ab", BeforeRevision: 9, Realm: 1}, false, 0, false},
		"authority, for good":        {svid.Revocation{AuthorityID: "ab"}, false, 1, false},
		"an agent's SPIFFE ID":       {svid.Revocation{SPIFFEID: "spiffe://shop.test/agent/n", BeforeRevision: 9}, false, 1, false},
		"agent":                      {svid.Revocation{AgentID: "spiffe://shop.test/agent/n", AgentHandle: 7, BeforeRevision: 9}, false, 1, false},
		"serial":                     {svid.Revocation{Serial: "abc"}, false, 1, false},
	} {
		test.r.ExpiresAt = now.Add(time.Minute) // what follows lives longer
		shared := Shared{Revocation: test.r, ID: id, Derived: test.derived}
		if err := shared.Check(); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_, ops, err := Import(shared, test.own, now)
		if err != nil {
			t.Fatal(err)
		}
		if got := len(ops) == 2; got != test.follows {
			t.Errorf("%s: %d writes; a record follows: want %t", name, len(ops), test.follows)
		}
		rec, err := Decode(store.KV{Key: ops[0].Key, Value: ops[0].Value, ModRevision: 500})
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(shared, rec.Share()); d != "" || !rec.Imported {
			t.Errorf("%s: what is told on differs (-heard +told):\n%s", name, d)
		}
		if !test.follows {
			continue
		}
		if rec, err = Decode(store.KV{Key: ops[1].Key, Value: ops[1].Value, ModRevision: 500}); err != nil {
			t.Fatal(err)
		}
		if rec.Realm != test.own || rec.BeforeRevision != 500 || rec.Imported || !rec.Derived || !rec.ExpiresAt.Equal(now.Add(maxLife+time.Minute)) {
			t.Errorf("%s: what follows is %+v; want one of realm %d, at the revision that wrote it, for as long as an SVID lives", name, rec, test.own)
		}
	}
}

func TestSharedRevocationsThatMakeNoSense(t *testing.T) {
	good := Shared{Revocation: svid.Revocation{SPIFFEID: "spiffe://shop.test/web", BeforeRevision: 9, ExpiresAt: end}, ID: "0123456789abcdef0123456789abcdef"}
	for name, edit := range map[string]func(*Shared){
		"no ID":             func(s *Shared) { s.ID = "" },
		"a short ID":        func(s *Shared) { s.ID = "abcd" },
		"an ID in capitals": func(s *Shared) { s.ID = "0123456789ABCDEF0123456789ABCDEF" },
		"a path for an ID":  func(s *Shared) { s.ID = "../trust/bundle" },
		"no subject":        func(s *Shared) { s.SPIFFEID = "" },
		"two subjects":      func(s *Shared) { s.Serial = "ab" },
		"no end":            func(s *Shared) { s.ExpiresAt = time.Time{} },
		"no such realm":     func(s *Shared) { s.Realm = svid.MaxRealm + 1 },
	} {
		s := good
		if edit(&s); s.Check() == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
}

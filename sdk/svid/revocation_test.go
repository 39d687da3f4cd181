// What a revocation reaches, as cases an operator would name and as laws.

package svid_test

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/sdk/svid"
)

func peer(id string, agent, revision uint64, authorities ...string) *svid.Peer {
	s := svid.Serial{Agent: agent, Revision: revision, Random: 5}
	return &svid.Peer{
		ID: spiffeid.RequireFromString(id), Serial: s, OurSerial: true, SerialHex: s.String(), AuthorityIDs: authorities,
	}
}

func TestRevocationConcerns(t *testing.T) {
	const web = "spiffe://td.test/web"
	foreign := peer("spiffe://td.test/web", 0, 0)
	foreign.OurSerial, foreign.Serial.Revision = false, 1000
	p := peer(web, 7, 100, "aa", "bb")
	tests := map[string]struct {
		rec  svid.Revocation
		peer *svid.Peer
		want bool
	}{
		"ID, issued before":              {svid.Revocation{SPIFFEID: web, BeforeRevision: 101}, p, true},
		"ID, issued by another CA":       {svid.Revocation{SPIFFEID: web, BeforeRevision: 101, Realm: 1}, p, false},
		"ID, by any CA":                  {svid.Revocation{SPIFFEID: web, Realm: 1}, p, true},
		"ID, issued at the revision":     {svid.Revocation{SPIFFEID: web, BeforeRevision: 100}, p, false},
		"ID without a limit":             {svid.Revocation{SPIFFEID: web}, p, true},
		"another ID":                     {svid.Revocation{SPIFFEID: "spiffe://td.test/we", BeforeRevision: 101}, p, false},
		"ID, number says nothing":        {svid.Revocation{SPIFFEID: web, BeforeRevision: 1}, foreign, true},
		"agent, issued before":           {svid.Revocation{AgentID: "spiffe://td.test/agent/n", AgentHandle: 7, BeforeRevision: 101}, p, true},
		"agent, issued later":            {svid.Revocation{AgentID: "spiffe://td.test/agent/n", AgentHandle: 7, BeforeRevision: 50}, p, false},
		"another agent":                  {svid.Revocation{AgentID: "spiffe://td.test/agent/n", AgentHandle: 8, BeforeRevision: 101}, p, false},
		"agent of another trust domain":  {svid.Revocation{AgentID: "spiffe://td.test2/agent/n", AgentHandle: 7, BeforeRevision: 101}, p, false},
		"agent without a handle":         {svid.Revocation{AgentID: "spiffe://td.test/agent/n"}, peer(web, 0, 1), false},
		"the agent's own SVID":           {svid.Revocation{AgentID: "spiffe://td.test/agent/n"}, peer("spiffe://td.test/agent/n", 7, 100), true},
		"issuing authority":              {svid.Revocation{AuthorityID: "aa", BeforeRevision: 101}, p, true},
		"authority further up":           {svid.Revocation{AuthorityID: "bb"}, p, true},
		"another authority":              {svid.Revocation{AuthorityID: "cc"}, p, false},
		"serial":                         {svid.Revocation{Serial: p.SerialHex}, p, true},
		"serial has no limit":            {svid.Revocation{Serial: p.SerialHex, BeforeRevision: 1}, p, true},
		"another serial":                 {svid.Revocation{Serial: "ff"}, p, false},
		"nobody":                         {svid.Revocation{}, p, false},
		"no peer":                        {svid.Revocation{SPIFFEID: web}, nil, false},
		"agent, number says nothing":     {svid.Revocation{AgentID: "spiffe://td.test/agent/n", AgentHandle: 7}, foreign, false},
		"authority, number says nothing": {svid.Revocation{AuthorityID: "aa", BeforeRevision: 1}, &svid.Peer{ID: p.ID, SerialHex: "1", AuthorityIDs: []string{"aa"}}, true},
	}
	for name, tt := range tests {
		rec, got := svid.NewRevocations([]svid.Revocation{tt.rec}).Concerning(tt.peer)
		if got != tt.want || (got && rec != tt.rec) {
			t.Errorf("%s: Concerning = %+v, %t; want %t", name, rec, got, tt.want)
		}
	}
}

// Revisions of two stores have no order: a record with a limit concerns SVIDs of
// its own realm alone, however high or low, and one without a limit all.
func TestRevocationsCompareRevisionsWithinARealmOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rec, p := recs.Draw(t, "rec"), peers.Draw(t, "p")
		rec.ExpiresAt = time.Time{}
		unlimited := rec
		unlimited.BeforeRevision = 0
		_, named := svid.NewRevocations([]svid.Revocation{unlimited}).Concerning(p)
		_, got := svid.NewRevocations([]svid.Revocation{rec}).Concerning(p)
		older := rec.Realm == p.Serial.Realm && p.Serial.Revision < rec.BeforeRevision
		if want := named && (rec.Serial != "" || rec.BeforeRevision == 0 || !p.OurSerial || older); got != want {
			t.Errorf("%+v concerns the SVID of realm %d, revision %d: %t; want %t", rec, p.Serial.Realm, p.Serial.Revision, got, want)
		}
	})
}

func TestRevocationConcernsJWTs(t *testing.T) {
	s := svid.Serial{Agent: 7, Revision: 100, Random: 5}
	j := &svid.JWT{ID: spiffeid.RequireFromString("spiffe://td.test/web"), KeyID: "k1", Serial: s, OurSerial: true, SerialHex: s.String()}
	for _, rec := range []svid.Revocation{
		{SPIFFEID: "spiffe://td.test/web", BeforeRevision: 101},
		{AgentID: "spiffe://td.test/agent/n", AgentHandle: 7, BeforeRevision: 101},
		{AuthorityID: "k1"},
		{Serial: s.String()},
	} {
		if _, ok := svid.NewRevocations([]svid.Revocation{rec}).ConcerningJWT(j); !ok {
			t.Errorf("%+v does not concern %+v", rec, j)
		}
	}
	if _, ok := svid.NewRevocations([]svid.Revocation{{AuthorityID: "K1"}}).ConcerningJWT(j); ok {
		t.Error("key IDs compare without regard to case")
	}
	// A token without jti has an empty serial, which no record names.
	if _, ok := svid.NewRevocations([]svid.Revocation{{SPIFFEID: "spiffe://td.test/x"}}).ConcerningJWT(&svid.JWT{ID: j.ID}); ok {
		t.Error("a record without a serial concerns a token without one")
	}
}

var (
	ids  = rapid.SampledFrom([]string{"spiffe://td.test/a", "spiffe://td.test/b", "spiffe://td.test/agent/n", "spiffe://other.test/a"})
	recs = rapid.Custom(func(t *rapid.T) svid.Revocation {
		r := svid.Revocation{BeforeRevision: rapid.Uint64Range(0, 4).Draw(t, "before"), Realm: rapid.Uint32Range(0, 2).Draw(t, "of")}
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 0:
			r.SPIFFEID = ids.Draw(t, "id")
		case 1:
			r.AgentID, r.AgentHandle = "spiffe://td.test/agent/n", rapid.Uint64Range(0, 2).Draw(t, "handle")
		case 2:
			r.AuthorityID = rapid.SampledFrom([]string{"aa", "bb"}).Draw(t, "authority")
		case 3:
			r.Serial = svid.Serial{Agent: 1, Revision: 1, Random: 5}.String()
		}
		if d := rapid.IntRange(0, 3).Draw(t, "expires"); d > 0 {
			r.ExpiresAt = time.Unix(int64(1000*d), 0)
		}
		return r
	})
	peers = rapid.Custom(func(t *rapid.T) *svid.Peer {
		p := peer(ids.Draw(t, "peer"), rapid.Uint64Range(0, 2).Draw(t, "agent"), rapid.Uint64Range(0, 4).Draw(t, "revision"))
		p.Serial.Realm = rapid.Uint32Range(0, 2).Draw(t, "realm")
		p.AuthorityIDs = rapid.SliceOfN(rapid.SampledFrom([]string{"aa", "bb", "cc"}), 1, 2).Draw(t, "authorities")
		return p
	})
)

// More records never make a revoked peer good again, in whatever order they come.
func TestRevocationsAreMonotoneAndOrderFree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		some, more := rapid.SliceOf(recs).Draw(t, "some"), rapid.SliceOf(recs).Draw(t, "more")
		p := peers.Draw(t, "p")
		set := svid.NewRevocations(some)
		_, before := set.Concerning(p)
		all := set.With(more...)
		_, after := all.Concerning(p)
		if before && !after {
			t.Fatal("a record more made a revoked peer good")
		}
		if _, still := set.Concerning(p); still != before {
			t.Fatal("With changed its receiver")
		}
		_, other := svid.NewRevocations(more).With(some...).Concerning(p)
		if other != after {
			t.Fatal("the order of records decides")
		}
		if all.With(more...).Len() != all.Len() {
			t.Fatal("adding a record twice makes the set larger")
		}
	})
}

// The set answers as its records do one by one: the maps lose nothing.
func TestRevocationsAnswerAsTheirRecordsDo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		list, p := rapid.SliceOf(recs).Draw(t, "records"), peers.Draw(t, "p")
		want := slices.ContainsFunc(list, func(r svid.Revocation) bool {
			_, ok := svid.NewRevocations([]svid.Revocation{r}).Concerning(p)
			return ok
		})
		if _, got := svid.NewRevocations(list).Concerning(p); got != want {
			t.Fatalf("the set says %t; its records %t", got, want)
		}
	})
}

// A set that grew record by record is the one that was made of all at once: what it
// says, how many there are, and their order. Of two of one subject the one that lives
// longer stays, in the first one's place.
func TestRevocationsGrowAsAListDoes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var (
			set   *svid.Revocations
			model []svid.Revocation
		)
		many := rapid.Custom(func(t *rapid.T) svid.Revocation {
			r := recs.Draw(t, "rec")
			if r.Serial != "" { // many different ones, so that there are layers
				r.Serial = svid.Serial{Agent: 1, Revision: 1, Random: rapid.Uint64Range(1, 300).Draw(t, "random")}.String()
			}
			return r
		})
		for _, batch := range rapid.SliceOf(rapid.SliceOfN(many, 1, 40)).Draw(t, "batches") {
			set = set.With(batch...)
			for _, rec := range batch {
				same := func(r svid.Revocation) bool {
					r.ExpiresAt, r.Note = rec.ExpiresAt, rec.Note
					return r == rec || rec.Serial != "" && r.Serial == rec.Serial // which is withdrawn whenever it was issued
				}
				i := slices.IndexFunc(model, same)
				switch {
				case i < 0:
					model = append(model, rec)
				case !model[i].ExpiresAt.IsZero() && (rec.ExpiresAt.IsZero() || rec.ExpiresAt.After(model[i].ExpiresAt)):
					model[i] = rec
				}
			}
			if set.Len() != len(model) || !slices.Equal(set.All(), model) {
				t.Fatalf("%d records: %+v; want %d: %+v", set.Len(), set.All(), len(model), model)
			}
		}
		p := peers.Draw(t, "p")
		if len(model) > 0 {
			p.SerialHex = cmp.Or(rapid.SampledFrom(model).Draw(t, "of").Serial, p.SerialHex)
		}
		_, got := set.Concerning(p)
		if _, want := svid.NewRevocations(model).Concerning(p); got != want {
			t.Fatalf("the set says %t; its records %t", got, want)
		}
		now := time.Unix(1500, 0)
		if !slices.Equal(set.Prune(now).All(), svid.NewRevocations(model).Prune(now).All()) {
			t.Fatal("Prune gives something else")
		}
	})
}

func TestPruneDropsOnlyExpiredRecords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set := svid.NewRevocations(rapid.SliceOf(recs).Draw(t, "records"))
		now := time.Unix(int64(rapid.IntRange(0, 4000).Draw(t, "now")), 0)
		pruned := set.Prune(now)
		var want []svid.Revocation
		for _, r := range set.All() {
			if r.ExpiresAt.IsZero() || r.ExpiresAt.After(now) {
				want = append(want, r)
			}
		}
		if !slices.Equal(pruned.All(), want) {
			t.Fatalf("Prune = %+v; want %+v", pruned.All(), want)
		}
	})
}

func TestEmptySetsConcernNobody(t *testing.T) {
	p := peer("spiffe://td.test/a", 1, 1)
	var zero svid.Revocations
	for _, set := range []*svid.Revocations{nil, &zero, svid.NewRevocations(nil), (*svid.Revocations)(nil).Prune(time.Now())} {
		if _, ok := set.Concerning(p); ok || set.Len() != 0 || len(set.All()) != 0 {
			t.Errorf("%+v concerns somebody", set)
		}
	}
	if _, ok := zero.With(svid.Revocation{SPIFFEID: "spiffe://td.test/a"}).Concerning(p); !ok {
		t.Error("a record added to the zero set is lost")
	}
}

func TestRecordsFromOutsideAreValidated(t *testing.T) {
	for name, rec := range map[string]svid.Revocation{
		"nothing": {}, "two subjects": {SPIFFEID: "spiffe://td.test/a", Serial: "5"},
		"bad ID": {SPIFFEID: "spiffe://td.test/a/"}, "bad agent": {AgentID: "n"},
		"upper-case serial": {Serial: "FFFFFFFFFFFFFFFFF"}, "serial 0": {Serial: "0"}, "signed serial": {Serial: "+5"}, "serial of 21 octets": {Serial: strings.Repeat("f", 42)},
		"handle": {AgentID: "spiffe://td.test/agent/n", AgentHandle: 1 << 48},
	} {
		if rec.Validate() == nil {
			t.Errorf("%s: %+v is valid", name, rec)
		}
	}
	for _, rec := range []svid.Revocation{
		{SPIFFEID: "spiffe://td.test/a"},
		{AgentID: "spiffe://td.test/agent/n", AgentHandle: 3},
		{AuthorityID: "aa"},
		{Serial: svid.Serial{Agent: 1, Random: 5}.String()},
	} {
		if err := rec.Validate(); err != nil {
			t.Errorf("%+v: %v", rec, err)
		}
	}
}

// BenchmarkConcerning is a look-up that finds nothing, in a set that came in one piece
// and in one that came record by record.
func BenchmarkConcerning(b *testing.B) {
	list := many(10_000)
	p := peer("spiffe://td.test/a", 7, 9, "aa", "bb")
	var grown *svid.Revocations
	for _, rec := range list {
		grown = grown.With(rec)
	}
	for name, set := range map[string]*svid.Revocations{"whole": svid.NewRevocations(list), "grown": grown} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				set.Concerning(p)
			}
		})
	}
}

// BenchmarkRevocationAdded is one record more, beside so many.
func BenchmarkRevocationAdded(b *testing.B) {
	for _, n := range []int{100, 10_000, 100_000} {
		b.Run(fmt.Sprint("records=", n), func(b *testing.B) {
			set := svid.NewRevocations(many(n))
			b.ReportAllocs()
			for i := uint64(1); b.Loop(); i++ {
				set = set.With(svid.Revocation{SPIFFEID: fmt.Sprint("spiffe://td.test/", i), BeforeRevision: i})
			}
		})
	}
}

func many(n int) (list []svid.Revocation) {
	for i := range uint64(n) {
		list = append(list, svid.Revocation{AgentID: fmt.Sprint("spiffe://td.test/agent/n", i), AgentHandle: i + 100, BeforeRevision: 5})
	}
	return list
}

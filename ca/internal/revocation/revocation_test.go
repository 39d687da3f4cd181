// Records in the store and in memory.

package revocation

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

var end = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

// written is what the store gives back for r, written at revision.
func written(t testing.TB, r svid.Revocation, revision uint64) *Record {
	t.Helper()
	op, key, err := Put(0, r)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := Decode(store.KV{Key: key, Value: op.Value, ModRevision: revision})
	if err != nil {
		t.Fatal(err)
	}
	return rec
}

func TestRecordSurvivesTheStore(t *testing.T) {
	for name, r := range map[string]svid.Revocation{
		"SPIFFE ID": {SPIFFEID: "spiffe://shop.test/web", ExpiresAt: end, Note: "stolen"},
		"agent":     {AgentID: "spiffe://shop.test/agent/n1", AgentHandle: 7, ExpiresAt: end},
		"authority": {AuthorityID: "ab12", ExpiresAt: end},
		"serial":    {Serial: "abc", ExpiresAt: end},
	} {
		want := r
		if r.Serial == "" {
			want.BeforeRevision = 42 // the transaction's own, not what the caller says
			r.BeforeRevision = 1
		}
		got := written(t, r, 42)
		if life := got.Life(); life > time.Until(end)+time.Minute || life < time.Until(end)-time.Minute {
			t.Errorf("%s: Life() = %v; want about %v", name, life, time.Until(end))
		}
		if d := cmp.Diff(want, got.Revocation); d != "" || got.Revision != 42 || !strings.HasPrefix(got.Key, Prefix) {
			t.Errorf("%s: key %s, revision %d (-want +got):\n%s", name, got.Key, got.Revision, d)
		}
		if got.Expired(end.Add(-time.Second)) || !got.Expired(end) {
			t.Errorf("%s: expired before its end, or not at it", name)
		}
	}
}

// A record that is overlooked revokes nobody: what cannot be read is an error.
func TestUnreadableRecordIsAnError(t *testing.T) {
	for _, value := range []string{
		"", "{}", "[]", `{"v":2,"spiffe_id":"spiffe://shop.test/web"}`, `{"v":1}`,
		`{"v":1,"spiffe_id":"spiffe://shop.test/web","serial":"ab"}`, `{"v":1,"serial":"AB"}`,
	} {
		if r, err := Decode(store.KV{Key: Prefix + "x", Value: []byte(value), ModRevision: 1}); err == nil {
			t.Errorf("Decode(%s) = %+v; want an error", value, r)
		}
	}
}

func peer(t testing.TB, id string, handle, revision uint64, authorities ...string) *svid.Peer {
	t.Helper()
	serial, err := svid.NewSerial(handle, revision)
	if err != nil {
		t.Fatal(err)
	}
	return &svid.Peer{
		ID: spiffeid.RequireFromString(id), Serial: serial, OurSerial: true, SerialHex: serial.String(),
		AuthorityIDs: authorities, NotAfter: end,
	}
}

func TestSetFindsWhatConcernsAPeer(t *testing.T) {
	p := peer(t, "spiffe://shop.test/web", 7, 10, "aa", "bb")
	records := map[string]*Record{
		"its ID":                 written(t, svid.Revocation{SPIFFEID: p.ID.String(), ExpiresAt: end}, 11),
		"its agent":              written(t, svid.Revocation{AgentID: "spiffe://shop.test/agent/n1", AgentHandle: 7, ExpiresAt: end}, 11),
		"an authority above it":  written(t, svid.Revocation{AuthorityID: "bb", ExpiresAt: end}, 11),
		"its serial":             written(t, svid.Revocation{Serial: p.SerialHex, ExpiresAt: end}, 11),
		"- before its issuance":  written(t, svid.Revocation{SPIFFEID: p.ID.String(), ExpiresAt: end}, 10),
		"- another ID":           written(t, svid.Revocation{SPIFFEID: "spiffe://shop.test/web2", ExpiresAt: end}, 11),
		"- another agent":        written(t, svid.Revocation{AgentID: "spiffe://shop.test/agent/n2", AgentHandle: 8, ExpiresAt: end}, 11),
		"- another authority":    written(t, svid.Revocation{AuthorityID: "cc", ExpiresAt: end}, 11),
		"- another serial":       written(t, svid.Revocation{Serial: "abc", ExpiresAt: end}, 11),
		"- the agent, as it was": written(t, svid.Revocation{AgentID: "spiffe://shop.test/agent/n1", AgentHandle: 7, ExpiresAt: end}, 9),
	}
	for name, r := range records {
		s := Set{}.With(r)
		if _, got := s.Concerning(p); got == strings.HasPrefix(name, "-") {
			t.Errorf("%s: concerned=%t", name, got)
		}
		if s = s.With(r); s.Len() != 1 {
			t.Errorf("%s: the set holds it %d times", name, s.Len())
		}
		s = s.Without(r.Key)
		if _, got := s.Concerning(p); got || s.Len() != 0 {
			t.Errorf("%s: concerned=%t by %d records after Without", name, got, s.Len())
		}
	}
	agent := peer(t, "spiffe://shop.test/agent/n1", 7, 10)
	s := newSet([]*Record{records["its agent"]})
	if _, got := s.Concerning(agent); !got {
		t.Error("an agent's revocation does not concern the agent itself")
	}
}

// However records came, a set answers as a walk over all of them would.
func TestSetIsItsRecords(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		ids := []string{"spiffe://shop.test/a", "spiffe://shop.test/b"}
		var all []*Record
		for i := range rapid.IntRange(0, 12).Draw(rt, "records") {
			expires := end.Add(time.Duration(rapid.IntRange(-1, 1).Draw(rt, "expires")) * time.Hour)
			all = append(all, written(t, svid.Revocation{SPIFFEID: rapid.SampledFrom(ids).Draw(rt, "id"), ExpiresAt: expires}, uint64(i+1)))
		}
		whole := newSet(rapid.Permutation(all).Draw(rt, "order"))
		s, gone := whole, map[string]bool{}
		for _, r := range all {
			if rapid.Bool().Draw(rt, "remove") {
				gone[r.Key] = true
				s = s.Without(r.Key)
			}
		}
		if got := whole.After(0, time.Time{}); len(got) != len(all) {
			rt.Errorf("the older set has changed: %d records; want %d", len(got), len(all))
		}
		after := rapid.Uint64Range(0, 13).Draw(rt, "after")
		var want []*Record
		var expired []string
		for _, r := range all {
			if gone[r.Key] {
				continue
			}
			if r.Expired(end) {
				expired = append(expired, r.Key)
			} else if r.Revision > after {
				want = append(want, r)
			}
		}
		if got := s.After(after, end); !slices.Equal(got, want) {
			rt.Errorf("After(%d) = %d records; want %d", after, len(got), len(want))
		}
		var got []string
		for _, r := range s.Expired(end) {
			got = append(got, r.Key)
		}
		if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(expired))) {
			rt.Errorf("Expired() = %v; want %v", got, expired)
		}
		if s.Len() != len(all)-len(gone) {
			rt.Errorf("Len() = %d; want %d", s.Len(), len(all)-len(gone))
		}
	})
}

// The cost of one record must not depend on how many there are.
func BenchmarkAddRecord(b *testing.B) {
	for _, n := range []int{1_000, 100_000} {
		b.Run(fmt.Sprintf("records=%d", n), func(b *testing.B) {
			var s Set
			record := func(i int) *Record {
				id := fmt.Sprintf("spiffe://shop.test/w/%d", i)
				return written(b, svid.Revocation{SPIFFEID: id, ExpiresAt: end.Add(time.Duration(i) * time.Millisecond)}, uint64(i+1))
			}
			for i := range n {
				s = s.With(record(i))
			}
			fresh := make([]*Record, 1_000)
			for i := range fresh {
				fresh[i] = record(n + i)
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				r := fresh[i%len(fresh)]
				s = s.Without(r.Key).With(r)
			}
		})
	}
}

// newSet makes a set of records in any order.
func newSet(records []*Record) Set {
	var s Set
	for _, r := range records {
		s = s.With(r)
	}
	return s
}

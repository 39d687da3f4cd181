// What the messages of Sync say, however they are encoded.

package api

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/sdk/svid"
)

// arrived is what an agent reads of m.
func arrived(t rapid.TB, m *capb.SyncResponse) *capb.SyncResponse {
	t.Helper()
	wire, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	got := &capb.SyncResponse{}
	if err := proto.Unmarshal(wire, got); err != nil {
		t.Fatal(err)
	}
	if len(got.ProtoReflect().GetUnknown()) > 0 {
		t.Fatal("an agent is sent what it does not know")
	}
	return got
}

// Records that are encoded once arrive as those that are encoded for each stream do, in
// order, each once, in messages of bounded size of which the last says synced.
func TestRevocationsArriveAsTheyAre(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		u := registry.Update{Revision: 9, Removed: []string{"gone"}}
		for i := range rapid.IntRange(0, 12).Draw(rt, "records") {
			r := &revocation.Record{Revocation: svid.Revocation{
				BeforeRevision: uint64(i), Realm: rapid.Uint32().Draw(rt, "realm"), Note: rapid.StringN(0, 5, 20).Draw(rt, "note"),
				ExpiresAt: time.Unix(rapid.Int64Range(1, 4e9).Draw(rt, "until"), 0),
			}}
			switch of := rapid.IntRange(0, 12).Draw(rt, "of"); of % 5 {
			case 0:
				r.SPIFFEID = fmt.Sprintf("spiffe://shop.test/%d", i)
			case 1:
				r.AgentID, r.AgentHandle = fmt.Sprintf("spiffe://shop.test/agent/%d", i), uint64(i)
			case 2:
				r.AuthorityID = fmt.Sprintf("%x", i)
			case 3:
				r.Serial = fmt.Sprintf("%x", i)
			case 4: // it does not go with many others
				r.Note = string(make([]byte, maxSyncBytes/3))
			}
			u.Revocations = append(u.Revocations, r)
		}
		for range 2 { // streams
			var got []*capb.Revocation
			last := false
			for m := range new(Service).messagesOf(u) {
				if last {
					rt.Fatal("a message after the last one")
				}
				if n := proto.Size(m); n > maxSyncBytes+100 {
					rt.Fatalf("a message has %d bytes", n)
				}
				m = arrived(rt, m)
				got, last = append(got, m.GetRevocations()...), m.GetSynced()
				if last && (m.GetRevision() != 9 || len(m.GetRemovedEntryIds()) != 1) {
					rt.Fatalf("the last message: %v", m)
				}
			}
			if len(got) != len(u.Revocations) || !last {
				rt.Fatalf("%d revocations arrive, the last message came: %t; want %d", len(got), last, len(u.Revocations))
			}
			for i, r := range u.Revocations {
				if want := revocationToProto(r); !proto.Equal(got[i], want) {
					rt.Fatalf("revocation %d arrives as %v; want %v", i, got[i], want)
				}
			}
		}
	})
}

// One that cannot be encoded is not left out: Send fails, and the agent comes again.
func TestRevocationThatCannotBeSentIsNotLeftOut(t *testing.T) {
	u := registry.Update{Revocations: []*revocation.Record{{Revocation: svid.Revocation{Serial: "a", Note: "\xff"}}}}
	for m := range new(Service).messagesOf(u) {
		if _, err := proto.Marshal(m); err == nil {
			t.Errorf("%v can be sent", m)
		}
	}
}

func BenchmarkRevocationsToOneStream(b *testing.B) {
	u := registry.Update{Revision: 9}
	for i := range 1500 {
		u.Revocations = append(u.Revocations, &revocation.Record{Revocation: svid.Revocation{
			AgentID: fmt.Sprintf("spiffe://shop.test/agent/join_token/node-%05d", i), AgentHandle: uint64(i) << 32, BeforeRevision: 1 << 33, ExpiresAt: time.Now().Add(time.Hour),
		}})
	}
	s := new(Service)
	b.ReportAllocs()
	for b.Loop() {
		for m := range s.messagesOf(u) {
			if _, err := proto.Marshal(m); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(u.Revocations)), "ns/revocation")
}

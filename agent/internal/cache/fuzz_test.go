package cache

import (
	"log/slog"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
)

// Whatever a CA sends, it is taken in, left out or refused; two messages, so that the
// second meets what the first left.
func FuzzSyncResponse(f *testing.F) {
	for _, m := range []*capb.SyncResponse{
		{Synced: true},
		{Reset_: true, Synced: true, Revision: 1, Entries: []*capb.Entry{newEntry("e1", "/web", "unix:uid:1"), {EntryId: "e2"}}, RemovedEntryIds: []string{"e1"}},
		{Revision: 5, Revocations: []*capb.Revocation{{}}, TrustBundle: &capb.TrustBundle{TrustDomain: td, Jwks: []byte(`{"keys":[]}`)}, Synced: true},
		{Synced: true, Stale: true, Revision: 1 << 40},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		c := New(Options{TrustDomain: spiffeid.RequireTrustDomainFromString(td), Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry()})
		for _, b := range [][]byte{first, second} {
			var m capb.SyncResponse
			if proto.Unmarshal(b, &m) != nil {
				return
			}
			if err := c.Apply(t.Context(), &m); err != nil {
				return
			}
		}
		if trust := c.Trust(); trust != nil && len(trust.X509) == 0 {
			t.Fatal("a trust bundle without a root is in force")
		}
	})
}

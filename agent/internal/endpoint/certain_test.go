// Why the agent cannot say that there is no entry.

package endpoint

import (
	"log/slog"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

func TestReasonForNotKnowing(t *testing.T) {
	c := &Callers{Cache: cache.New(cache.Options{
		TrustDomain: spiffeid.RequireTrustDomainFromString("example.test"),
		Logger:      slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})}
	want := func(reason string) {
		t.Helper()
		st := status.Convert(c.cannotTell())
		if len(st.Details()) != 1 || st.Code() != codes.Unavailable {
			t.Fatalf("cannotTell() = %v; want Unavailable with a reason", st)
		}
		if got := st.Details()[0].(*errdetails.ErrorInfo).GetReason(); got != reason {
			t.Errorf("reason %s; want %s", got, reason)
		}
	}
	want(NotSynced)
	if err := c.Cache.Apply(t.Context(), &capb.SyncResponse{Synced: true}); err != nil {
		t.Fatal(err)
	}
	want(Incomplete) // in sync: then it is the attestation
	if err := c.Cache.Apply(t.Context(), &capb.SyncResponse{Synced: true, Stale: true}); err != nil {
		t.Fatal(err)
	}
	want(NotSynced)
	c.Cache.Disconnected()
	want(NotSynced)
}

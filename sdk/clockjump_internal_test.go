//go:build clockjump

// What is an age, or the life of a connection, does not change with a clock that is
// set. It needs a package time that can jump: make clocks.

package sdk

import (
	"crypto/x509"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/sdk/svid"
)

const hour = 3600

func TestClockJumpsMakeNothingFreshOrStale(t *testing.T) {
	for _, jump := range []int64{-hour, hour} {
		id := new(Identity)
		id.denyAfter.Store(int64(5 * time.Minute))
		old, fresh := time.Now().Add(-4*time.Minute), time.Now()
		for _, field := range []interface{ Store(int64) }{&id.revocationsAsOf, &id.news.asOf} {
			field.Store(steadyAsOf(old, time.Now()))
		}
		id.news.arrive(1)
		id.news.hear(2, fresh)
		time.Jump(jump)
		if got := id.stale(time.Now()); got != "" {
			t.Errorf("after a jump of %d s: %s at once", jump, got)
		}
		if got := id.stale(time.Now().Add(2 * time.Minute)); got != policy.StaleRevocations {
			t.Errorf("after a jump of %d s and 6 minutes in all: %q; want STALE_REVOCATIONS", jump, got)
		}
		if now := time.Now(); !id.news.decides(now) || id.news.decides(now.Add(lag)) {
			t.Errorf("after a jump of %d s an old version does not decide for %v", jump, lag)
		}
		time.Jump(0)
	}
}

// A clock that is a year ahead for a while, and hears of another revocation then, must not
// have the SDK forget those of before it was.
func TestRevocationsOutliveAClockThatJumps(t *testing.T) {
	peer := &svid.Peer{ID: spiffeid.RequireFromString("spiffe://sdktest.test/web")}
	id := &Identity{conns: newConnTable(slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler)}
	id.ready.init()
	id.current.Store(&current{trust: new(svid.Trust)})
	hear := func(path string) {
		id.revoke(t.Context(), &agentpb.WatchResponse{Revocations: []*agentpb.Revocation{{
			Subject:   &agentpb.Revocation_SpiffeId{SpiffeId: "spiffe://sdktest.test" + path},
			ExpiresAt: timestamppb.New(time.Now().Add(25 * time.Hour)),
		}}})
	}
	hear("/web")
	time.Jump(365 * 24 * hour)
	id.pruned = time.Time{} // a while ago
	hear("/orders")
	time.Jump(0)
	if !id.isRevoked(&liveConn{peer: peer}) {
		t.Error("a revocation is forgotten")
	}
}

func TestConnectionsLiveNoLongerForAClockThatIsSetBack(t *testing.T) {
	table := newConnTable(slog.New(slog.DiscardHandler))
	peer := &svid.Peer{ID: spiffeid.RequireFromString("spiffe://sdktest.test/web")}
	for jump, left := range map[int64]bool{0: true, -hour: true, hour: false} {
		a, b := net.Pipe()
		defer b.Close()
		now := time.Now()
		table.add(new(*x509.Certificate), &liveConn{raw: a, peer: peer, end: now.Add(30 * time.Minute).Round(0)}, now)
		time.Jump(jump)
		table.sweep(time.Now())
		if got := table.size.Load() == 1; got != left {
			t.Errorf("after a jump of %d s the connection is there: %v; want %v", jump, got, left)
		}
		table.sweep(time.Now().Add(30 * time.Minute))
		if table.size.Load() != 0 {
			t.Errorf("after a jump of %d s the connection outlives its half hour", jump)
		}
		time.Jump(0)
	}
}

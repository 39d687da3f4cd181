// The second looks: at entry into the table, and at each call. From outside
// they show only when a push and a handshake or call meet in time.

package sdk

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/policy"
	"merlon.dev/sdk/svid"
)

// bare is an identity that no agent serves, which trusts root "aa".
func bare() *Identity {
	log := slog.New(slog.DiscardHandler)
	id := &Identity{log: log, conns: newConnTable(log), report: newReport(), calls: newLiveCalls()}
	id.ready.init()
	id.ready.haveRevocations()
	own := spiffeid.RequireFromString("spiffe://sdktest.test/orders")
	id.current.Store(&current{
		svid:     &x509svid.SVID{ID: own},
		notAfter: time.Now().Add(time.Hour),
		trust:    new(svid.Trust),
		roots:    map[spiffeid.TrustDomain]map[string]bool{own.TrustDomain(): {"aa": true}},
	})
	return id
}

// pipe is one end of a connection.
func pipe(t *testing.T) net.Conn {
	t.Helper()
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	return here
}

func peerUnder(authorities ...string) *svid.Peer {
	return &svid.Peer{
		ID:           spiffeid.RequireFromString("spiffe://sdktest.test/web"),
		NotAfter:     time.Now().Add(time.Hour),
		AuthorityIDs: authorities,
	}
}

func TestPushDuringAHandshakeIsNotMissed(t *testing.T) {
	for name, tc := range map[string]struct {
		push func(*Identity, *trackedConn)
		ok   bool
	}{
		"nothing": {func(*Identity, *trackedConn) {}, true},
		"revocation": {func(id *Identity, _ *trackedConn) {
			id.revocations.Store(svid.NewRevocations([]svid.Revocation{{SPIFFEID: "spiffe://sdktest.test/web"}}))
		}, false},
		"root removed": {func(id *Identity, _ *trackedConn) {
			now := *id.current.Load()
			now.roots = nil
			id.current.Store(&now)
		}, false},
		"identity withdrawn": {func(id *Identity, _ *trackedConn) { id.current.Store(&current{err: errors.New("gone")}) }, false},
		"identity renamed": {func(id *Identity, _ *trackedConn) {
			now := *id.current.Load()
			now.svid = &x509svid.SVID{ID: spiffeid.RequireFromString("spiffe://sdktest.test/other")}
			id.current.Store(&now)
		}, false},
		"identity rotated": {func(id *Identity, _ *trackedConn) {
			now := *id.current.Load()
			now.notAfter = now.notAfter.Add(time.Hour)
			id.current.Store(&now)
		}, true},
		"identity closed":   {func(id *Identity, _ *trackedConn) { id.closed.Store(true) }, false},
		"connection closed": {func(_ *Identity, c *trackedConn) { c.closed.Store(true) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			id, peer := bare(), peerUnder("bb", "aa")
			if err := id.admit(peer); err != nil {
				t.Fatal(err)
			}
			conn := &trackedConn{Conn: pipe(t), table: id.conns}
			own := id.current.Load()
			tc.push(id, conn) // between the first look and the entry
			err := id.enter(new(*x509.Certificate), conn, peer, own, time.Now())
			if (err == nil) != tc.ok {
				t.Errorf("enter = %v; want success %v", err, tc.ok)
			}
			if size := id.conns.size.Load(); (size == 1) != tc.ok {
				t.Errorf("%d connections in the table", size)
			}
		})
	}
}

// A connection ends with the X509-SVID that it has shown, also where a later
// one has come before the handshake was done.
func TestConnectionEndsWithWhatItHasShown(t *testing.T) {
	id, peer, key := bare(), peerUnder("aa"), new(*x509.Certificate)
	peer.NotAfter = time.Now().Add(3 * time.Hour)
	shown := id.snapshot()
	later := *id.current.Load()
	later.svid, later.notAfter = &x509svid.SVID{ID: later.svid.ID}, later.notAfter.Add(time.Hour)
	id.current.Store(&later)
	if got, err := shown.GetX509SVID(); err != nil || got != shown.svid {
		t.Errorf("shows %v, %v", got, err)
	}
	conn := &trackedConn{Conn: pipe(t), table: id.conns}
	if err := id.enter(key, conn, peer, shown.current, time.Now()); err != nil {
		t.Fatal(err)
	}
	v, _ := id.conns.conns.Load(key)
	if c := v.(*liveConn); !c.end.Equal(shown.notAfter) {
		t.Errorf("ends at %v; want %v", c.end, shown.notAfter)
	}
}

func TestEachCallLooksAtThePeerAgain(t *testing.T) {
	expired := peerUnder("aa")
	expired.NotAfter = time.Now()
	for name, tc := range map[string]struct {
		peer    *svid.Peer
		revoked bool
		in      *policy.Input
		want    policy.Reason
	}{
		"no input":       {peerUnder("aa"), false, nil, policy.BadRequest},
		"no peer":        {nil, false, &policy.Input{Source: "spiffe://sdktest.test/web", Protocol: policy.HTTP, Path: "/"}, policy.NoIdentity},
		"expired":        {expired, false, &policy.Input{Protocol: policy.HTTP, Path: "/"}, policy.Expired},
		"revoked":        {peerUnder("aa"), true, &policy.Input{Protocol: policy.HTTP, Path: "/"}, policy.Revoked},
		"ambiguous path": {peerUnder("aa"), false, &policy.Input{Protocol: policy.HTTP, Path: "/a/../b"}, policy.BadRequest},
		"path of gRPC":   {peerUnder("aa"), false, &policy.Input{Protocol: policy.GRPC, Path: "a/b"}, policy.BadRequest},
		"no protocol":    {peerUnder("aa"), false, &policy.Input{}, policy.BadRequest},
	} {
		id := bare()
		if tc.revoked {
			id.revocations.Store(svid.NewRevocations([]svid.Revocation{{SPIFFEID: tc.peer.ID.String()}}))
		}
		var conn *liveConn
		if tc.peer != nil {
			conn = &liveConn{peer: tc.peer}
		}
		d := id.decide(t.Context(), conn, tc.in)
		if d.Allow || d.Reason != tc.want || d.DecisionID.IsZero() {
			t.Errorf("%s: %+v; want a denial for %s", name, d, tc.want)
		}
	}
}

func TestDenialsAreLoggedWithoutFloodingTheLog(t *testing.T) {
	var lines int
	log := slog.New(countingHandler{&lines})
	var l limitedLog
	for range 10 * linesPerSecond {
		l.log(t.Context(), log, "call denied")
	}
	if lines < linesPerSecond || lines > 2*linesPerSecond {
		t.Errorf("%d lines; want %d, or twice that where a second ended", lines, linesPerSecond)
	}
}

// countingHandler counts the lines of a log.
type countingHandler struct{ lines *int }

func (countingHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h countingHandler) Handle(context.Context, slog.Record) error { *h.lines++; return nil }

func (h countingHandler) WithAttrs([]slog.Attr) slog.Handler { return h }

func (h countingHandler) WithGroup(string) slog.Handler { return h }

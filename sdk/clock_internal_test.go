// What is left to the wall clock: whether the own X509-SVID is good, each time anew.
// clockjump_internal_test.go has clocks that jump.

package sdk

import (
	"crypto/x509"
	"log/slog"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

func TestIdentityIsGoodWhileTheClockSaysSo(t *testing.T) {
	ca := forge.New(t, "sdktest.test")
	begin := time.Now().Truncate(time.Second)
	end := begin.Add(time.Hour)
	own := ca.Leaf("/web", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = begin, end }).X509SVID()
	chain, key, err := own.MarshalRaw()
	if err != nil {
		t.Fatal(err)
	}
	message := &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: own.ID.String(), X509Svid: chain, X509SvidKey: key, Bundle: ca.Cert.Raw}}}
	for name, received := range map[string]time.Time{
		"in time": begin.Add(time.Minute), "too early": begin.Add(-time.Hour), "too late": end.Add(time.Hour),
	} {
		now, err := parseSVIDs(message, received)
		if err != nil || now.svid == nil {
			t.Errorf("received %s: %v, %v", name, err, now)
			continue
		}
		for at, good := range map[time.Time]bool{
			begin.Add(-1): false, begin: true, end.Add(-1): true, end: false,
		} {
			if err := now.goodAt(at); (err == nil) != good {
				t.Errorf("received %s, shown at %v of %v to %v: %v; want it good: %v", name, at, begin, end, err, good)
			}
		}
	}
}

// A clock that is ahead must not have revocations forgotten for the time when it is
// right again.
func TestRevocationsOutliveAClockThatIsAhead(t *testing.T) {
	ca := forge.New(t, "sdktest.test")
	peer, err := svid.VerifyChain(ca.Leaf("/web").X509SVID().Certificates, ca.Bundle().X509Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	id := &Identity{conns: newConnTable(slog.New(slog.DiscardHandler)), log: slog.New(slog.DiscardHandler)}
	id.ready.init()
	id.current.Store(&current{trust: new(svid.Trust)})
	id.revoke(t.Context(), &agentpb.WatchResponse{Revocations: []*agentpb.Revocation{{
		Subject:   &agentpb.Revocation_SpiffeId{SpiffeId: peer.ID.String()},
		ExpiresAt: timestamppb.New(time.Now().Add(-time.Hour)),
	}}})
	if !id.isRevoked(&liveConn{peer: peer}) {
		t.Error("a revocation that ended an hour ago is forgotten")
	}
}

// What cleared a connection is one set of revocations: the next one is looked at again, and
// so is the one after.
func TestConnectionsAreHeldAgainstEachSetOfRevocations(t *testing.T) {
	ca := forge.New(t, "sdktest.test")
	peer, err := svid.VerifyChain(ca.Leaf("/web").X509SVID().Certificates, ca.Bundle().X509Bundle(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	id, conn := &Identity{}, &liveConn{peer: peer}
	of := func(path string) *svid.Revocations {
		return svid.NewRevocations([]svid.Revocation{{SPIFFEID: "spiffe://sdktest.test" + path}})
	}
	for i, set := range []*svid.Revocations{nil, of("/orders"), of("/web"), of("/orders"), of("/web").With(), nil} {
		id.revocations.Store(set)
		_, want := set.Concerning(peer)
		for range 2 {
			if got := id.isRevoked(conn); got != want {
				t.Errorf("set %d: revoked %t; want %t", i, got, want)
			}
		}
	}
}

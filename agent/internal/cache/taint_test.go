package cache

import (
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// both is a trust bundle with two roots, of which the tainted one is named.
func (f *fixture) both(sequence uint64, old, next *forge.Authority, spread time.Duration, tainted bool) *capb.TrustBundle {
	f.t.Helper()
	bundle := old.Bundle()
	for _, root := range next.Bundle().X509Authorities() {
		bundle.AddX509Authority(root)
	}
	jwks, err := bundle.Marshal()
	if err != nil {
		f.t.Fatal(err)
	}
	b := &capb.TrustBundle{TrustDomain: td, Sequence: sequence, Jwks: jwks}
	if tainted {
		b.TaintedAuthorityIds, b.RenewSpread = []string{hex.EncodeToString(old.Root().Cert.SubjectKeyId)}, durationpb.New(spread)
	}
	return b
}

// workloads are streams of workloads /0, /1, …, each with its SVID.
func (f *fixture) workloads(n int) []*Subscription {
	f.t.Helper()
	var entries []*capb.Entry
	for i := range n {
		entries = append(entries, newEntry(fmt.Sprintf("e%d", i), fmt.Sprintf("/%d", i), fmt.Sprintf("unix:uid:%d", i)))
	}
	f.sync(entries...)
	subs := make([]*Subscription, n)
	for i := range subs {
		subs[i] = f.Subscribe()
		subs[i].View(proves(fmt.Sprintf("unix:uid:%d", i)), true)
	}
	synctest.Wait()
	return subs
}

// under counts the workloads whose SVID is under root, and delivers what they
// have.
func under(t *testing.T, subs []*Subscription, root *forge.Authority) (n int) {
	t.Helper()
	id := hex.EncodeToString(root.Root().Cert.SubjectKeyId)
	for i, s := range subs {
		v := s.View(proves(fmt.Sprintf("unix:uid:%d", i)), true)
		if len(v.SVIDs) != 1 {
			t.Fatalf("workload %d has %d SVIDs", i, len(v.SVIDs))
		}
		if slices.Contains(v.SVIDs[0].Peer.AuthorityIDs, id) {
			n++
		}
		s.Delivered(v.Trust.Sequence)
	}
	return n
}

func closeAll(subs []*Subscription) {
	for _, s := range subs {
		s.Close()
	}
}

func TestTaintReplacesEverySVIDSpreadOverTime(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		const n = 200
		old := f.ca.root
		next := forge.New(t, td, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(1000 * time.Hour) })
		subs := f.workloads(n)
		defer closeAll(subs)
		f.apply(&capb.SyncResponse{TrustBundle: f.both(2, old, next, 0, false)})
		if got := under(t, subs, old); got != n {
			t.Fatalf("%d of %d SVIDs are under the old root", got, n)
		}
		if _, got := f.Ack(false); got != 2 {
			t.Fatalf("Ack() = %d; want 2", got)
		}
		f.ca.set(func(s *signer) { s.root = next })
		f.apply(&capb.SyncResponse{TrustBundle: f.both(3, old, next, 40*time.Second, true)})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := under(t, subs, next); got < n/8 || got > n/2 {
			t.Errorf("%d of %d SVIDs are replaced after a quarter of the time", got, n)
		}
		if _, got := f.Ack(false); got != 2 {
			t.Errorf("Ack() = %d while tainted SVIDs are served; want 2", got)
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if got := under(t, subs, next); got != n {
			t.Errorf("%d of %d SVIDs are replaced after all of the time", got, n)
		}
		if _, got := f.Ack(true); got != 2 {
			t.Errorf("Ack() = %d while the agent's own SVID is tainted; want 2", got)
		}
		if _, got := f.Ack(false); got != 3 {
			t.Errorf("Ack() = %d; want 3", got)
		}
	})
}

// A CA that is away, or has no other authority yet, costs nobody an SVID.
func TestTaintedSVIDIsServedUntilThereIsAnother(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		old := f.ca.root
		next := forge.New(t, td, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(1000 * time.Hour) })
		subs := f.workloads(3)
		defer closeAll(subs)
		f.ca.set(func(s *signer) { s.err = status.Error(codes.Unavailable, "away") })
		f.apply(&capb.SyncResponse{TrustBundle: f.both(2, old, next, time.Second, true)})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if got := under(t, subs, old); got != 3 {
			t.Errorf("%d of 3 SVIDs are served while the CA is away", got)
		}
		// It answers, and still signs under the old root.
		f.ca.set(func(s *signer) { s.err, s.requests = nil, nil })
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := under(t, subs, old); got != 3 {
			t.Errorf("%d of 3 SVIDs are under the old root", got)
		}
		if n := f.ca.count(); n > 60 {
			t.Errorf("%d requests in 2 minutes; want some seconds between them", n)
		}
		f.ca.set(func(s *signer) { s.root = next })
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if got := under(t, subs, next); got != 3 {
			t.Errorf("%d of 3 SVIDs are replaced", got)
		}
	})
}

func TestTaintedSVIDThatNobodyUsesIsForgotten(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		old := f.ca.root
		next := forge.New(t, td, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(1000 * time.Hour) })
		closeAll(f.workloads(3))
		f.apply(&capb.SyncResponse{TrustBundle: f.both(2, old, next, time.Minute, true)})
		synctest.Wait()
		if _, got := f.Ack(false); got != 2 {
			t.Errorf("Ack() = %d; want 2, nobody is served a tainted SVID", got)
		}
	})
}

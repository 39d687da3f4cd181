// The CA's own SVID: when a new one is due.

package ca

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/sdk/svid"
)

func TestOwnSVIDIsDueAtHalfLife(t *testing.T) {
	p, log := openParts(t)
	own, err := p.own.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	leaf := own.Certificates[0]
	if own.ID != entry.CAID(p.own.td) || !slices.Equal(leaf.DNSNames, []string{"localhost", "ca.shop.test"}) {
		t.Errorf("own SVID of %s for %q", own.ID, leaf.DNSNames)
	}
	if n := recorded(t, log, `"serial":"`+p.own.current.Load().peer.SerialHex); n != 1 {
		t.Errorf("%d audit records of the own SVID; want 1", n)
	}
	for after, want := range map[time.Duration]bool{-time.Hour: true, 0: false, 29 * time.Minute: false, 30*time.Minute + 2*time.Second: true, 2 * time.Hour: true} {
		if got := p.own.due(time.Now().Add(after)); got != want {
			t.Errorf("due(%s) = %t; want %t", after, got, want)
		}
	}
	// The wall clock alone decides: a sleeping machine's timers stand still.
	if at := p.own.current.Load().renewAt; at != at.Round(0) {
		t.Error("renewAt follows the monotonic clock")
	}
	if _, err := (&ownSVID{}).GetX509SVID(); err == nil {
		t.Error("GetX509SVID before the first: no error")
	}
}

func TestRevokedOwnSVIDIsReplacedAtOnce(t *testing.T) {
	p, _ := openParts(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.own.run(ctx, slog.New(slog.DiscardHandler)) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	before := p.own.current.Load()
	op, _, err := revocation.Put(0, svid.Revocation{Serial: before.peer.SerialHex, ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	p.put(t, op)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if now := p.own.current.Load(); now != before {
			checkSource(t, p.own, now.svid)
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("a revoked SVID is still presented")
		}
	}
}

func checkSource(t *testing.T, source x509svid.Source, want *x509svid.SVID) {
	t.Helper()
	if got, err := source.GetX509SVID(); err != nil || got != want {
		t.Errorf("GetX509SVID() = %v, %v; want the new one", got, err)
	}
}

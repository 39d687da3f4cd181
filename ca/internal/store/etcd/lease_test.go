package etcd_test

// Leading: what passes to whom when a store closes, loses etcd, or is paused.

import (
	"context"
	"errors"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/integration/stage"
)

const ttl = 3 * time.Second

func lead(t testing.TB, s store.Store) store.Leadership {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := s.Campaign(ctx, "rotation", ttl)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// fenced writes under the fence of a leadership.
func fenced(t testing.TB, s store.Store, l store.Leadership) bool {
	t.Helper()
	res, err := s.Txn(t.Context(), []store.Cmp{l.Fence()}, []store.Op{store.Put("led", nil)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res.Succeeded
}

func TestCloseHandsLeadershipOver(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	first, second := open(t, cfg), open(t, cfg)
	defer second.Close()
	old := lead(t, first)
	if !fenced(t, first, old) {
		t.Fatal("fence of the leader does not hold")
	}
	began := time.Now()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	<-old.Lost()
	l := lead(t, second)
	if waited := time.Since(began); waited > ttl/2 {
		t.Errorf("the next leader came after %s, when the lease had run out", waited)
	}
	if fenced(t, second, old) || !fenced(t, second, l) {
		t.Error("fences do not tell the leaders apart")
	}
}

// A leader that loses etcd must know that it does not lead before another can.
func TestLeaderKnowsWhenItsLeaseMayHaveRunOut(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	s := open(t, config(e))
	defer s.Close()
	l := lead(t, s)
	select { // renewed as long as etcd is there
	case <-l.Lost():
		t.Fatal("lost while etcd was there")
	case <-time.After(ttl + ttl/2):
	}
	e.Members[0].Pause()
	paused := time.Now()
	<-l.Lost()
	if held := time.Since(paused); held > ttl {
		t.Errorf("led for %s after etcd had stopped to renew a lease of %s", held, ttl)
	}
	e.Members[0].Resume()
	next := lead(t, s) // with a new lease
	if fenced(t, s, l) || !fenced(t, s, next) {
		t.Error("the fence of a lost leadership holds")
	}
}

// A process that was paused does not know that others lead; its fence does.
func TestFenceStopsALeaderThatWasReplaced(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	s, other := open(t, cfg), open(t, cfg)
	defer s.Close()
	defer other.Close()
	l := lead(t, s)
	client := e.Client()
	leases, err := client.Leases(t.Context())
	if err != nil || len(leases.Leases) != 1 {
		t.Fatalf("%d leases, %v; want 1", len(leases.Leases), err)
	}
	if _, err := client.Revoke(t.Context(), leases.Leases[0].ID); err != nil { // as if it had run out
		t.Fatal(err)
	}
	next := lead(t, other)
	if fenced(t, s, l) {
		t.Error("the fence of a replaced leader holds")
	}
	<-l.Lost() // with the next renewal
	if err := l.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !fenced(t, other, next) {
		t.Error("resigning took the lead from another")
	}
}

func TestOneLeasePerStore(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	s := open(t, config(e))
	for _, name := range []string{"rotation", "expiry", "index"} {
		if _, err := s.Campaign(t.Context(), name, ttl); err != nil {
			t.Fatal(err)
		}
	}
	client := e.Client()
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 1 {
		t.Errorf("%d leases, %v; want 1", len(leases.Leases), err)
	}
	s.Close()
	if leases, err := client.Leases(t.Context()); err != nil || len(leases.Leases) != 0 {
		t.Errorf("%d leases after Close, %v; want 0", len(leases.Leases), err)
	}
}

// Resigning without etcd is made good when it is back.
func TestResignWithoutEtcd(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	cfg.RequestTimeout = time.Second
	s, other := open(t, cfg), open(t, cfg)
	defer s.Close()
	defer other.Close()
	l, err := s.Campaign(t.Context(), "rotation", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	e.Members[0].Pause()
	if err := l.Resign(t.Context()); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Resign = %v; want %v", err, store.ErrUnavailable)
	}
	<-l.Lost()
	e.Members[0].Resume()
	lead(t, other)
}

package etcd_test

// What etcd cannot do: without a quorum, with its quota used up, with its
// history compacted, with a value that is not what was written.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

func TestNoQuorum(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 3)
	cfg := config(e)
	cfg.RequestTimeout = 2 * time.Second
	s := open(t, cfg)
	defer s.Close()
	put(t, s, "a", "v")
	e.Members[1].Kill()
	e.Members[2].Kill()
	began := time.Now()
	if _, err := s.Txn(context.Background(), nil, []store.Op{store.Put("a", nil)}, nil); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Txn = %v; want %v", err, store.ErrUnavailable)
	}
	if _, _, err := s.Get(context.Background(), "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Get = %v; want %v", err, store.ErrUnavailable)
	}
	if took := time.Since(began); took > 8*time.Second {
		t.Errorf("two requests took %s without a quorum; want 2 s each at most", took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := s.Get(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Get with a shorter deadline = %v; want %v", err, context.DeadlineExceeded)
	}
	e.Members[1].Restart()
	eventually(t, "the store is back", func() error {
		_, err := s.Txn(t.Context(), nil, []store.Op{store.Put("a", nil)}, nil)
		return err
	})
}

func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	stage.Eventually(t, what, check)
}

func TestNoEtcd(t *testing.T) {
	t.Parallel()
	cfg := etcd.Config{Endpoints: []string{fmt.Sprintf("http://127.0.0.1:%d", stage.FreePort(t))}, RequestTimeout: 500 * time.Millisecond}
	_, err := etcd.Open(t.Context(), cfg)
	if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("Open = %v; want %v, and why", err, store.ErrUnavailable)
	}
}

// Members of two clusters would be two stores.
func TestTwoClustersAreNotOneStore(t *testing.T) {
	t.Parallel()
	// What tells clusters apart in real life is their CA; here the second
	// takes everybody in.
	one, two := stage.StartEtcd(t, 1), stage.StartEtcd(t, 1, "--client-cert-auth=false", "--trusted-ca-file=")
	cfg := config(one)
	cfg.Endpoints = append(cfg.Endpoints, two.Members[0].Endpoint)
	cfg.RequestTimeout = 2 * time.Second
	cfg.CAFile = join(t, one.Files.CA, two.Files.CA)
	if _, err := etcd.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "different clusters") {
		t.Errorf("Open = %v; want an error that says so", err)
	}
	two.Members[0].Pause() // it is found out later
	s := open(t, cfg)
	defer s.Close()
	put(t, s, "a", "v")
	two.Members[0].Resume()
	one.Members[0].Kill()
	for range 2 {
		if kv, _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("Get = %v, %v; want %v", kv, err, store.ErrUnavailable)
		}
	}
}

func TestQuotaMakesTheStoreReadOnly(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1, "--quota-backend-bytes=4194304")
	s := open(t, config(e))
	defer s.Close()
	put(t, s, "small", "v")
	big := bytes.Repeat([]byte("x"), store.MaxValueBytes)
	var err error
	var n int
	for n = 0; err == nil && n < 100; n++ {
		_, err = s.Txn(t.Context(), nil, []store.Op{store.Put(fmt.Sprintf("big/%d", n), big)}, nil)
	}
	if !errors.Is(err, store.ErrReadOnly) || !strings.Contains(err.Error(), "alarm disarm") {
		t.Fatalf("after %d large writes Txn = %v; want %v, and what to do", n, err, store.ErrReadOnly)
	}
	if _, err := s.Txn(t.Context(), nil, []store.Op{store.Put("small", nil)}, nil); !errors.Is(err, store.ErrReadOnly) {
		t.Errorf("small Txn = %v; want %v", err, store.ErrReadOnly)
	}
	kv, revision, err := s.Get(t.Context(), "small")
	if err != nil || string(kv.Value) != "v" {
		t.Errorf("Get = %v, %v; reads must go on", kv, err)
	}
	if _, _, _, err := s.List(t.Context(), "", "", 10, 0); err != nil {
		t.Errorf("List = %v; reads must go on", err)
	}
	batches, err := s.Watch(t.Context(), "", revision)
	if err != nil {
		t.Fatalf("Watch = %v; watches must go on", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := s.Campaign(ctx, "rotation", ttl); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Campaign = %v; want it to wait", err)
	}

	// What the error says to do.
	for i := range n {
		if _, err := s.Txn(t.Context(), nil, []store.Op{store.Delete(fmt.Sprintf("big/%d", i))}, nil); err != nil {
			t.Fatalf("delete = %v; want room to be made", err)
		}
	}
	compact(t, e)
	client := e.Client()
	if _, err := client.Defragment(t.Context(), e.Members[0].Endpoint); err != nil {
		t.Fatal(err)
	}
	alarms, err := client.AlarmList(t.Context())
	if err != nil || len(alarms.Alarms) != 1 {
		t.Fatalf("%v, %v; want one alarm", alarms, err)
	}
	if _, err := client.AlarmDisarm(t.Context(), clientAlarm(alarms)); err != nil {
		t.Fatal(err)
	}
	at := put(t, s, "small", "again")
	for b := range batches {
		if b.Revision == at {
			break
		}
	}
}

// A watcher that does not read is stopped by flow control; what it has not
// read is compacted meanwhile.
func TestCompactionOvertakesASlowWatcher(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 3)
	s := open(t, config(e))
	defer s.Close()
	begin := put(t, s, "a", "v")
	slow, err := s.Watch(t.Context(), "", begin)
	if err != nil {
		t.Fatal(err)
	}
	before := heap()
	big := bytes.Repeat([]byte("x"), store.MaxValueBytes)
	var written []uint64
	for i := range 120 {
		written = append(written, put(t, s, fmt.Sprintf("big/%d", i%10), string(big)))
	}
	if grown := int64(heap()) - int64(before); grown > 30<<20 {
		t.Errorf("%d MiB are held for a watcher that does not read", grown>>20)
	}
	put(t, s, "last", "v")
	compact(t, e)
	// The members have to carry out the compaction, and the watch to learn.
	n := 0
	for b := range slow {
		if b.Revision != written[n] {
			t.Fatalf("slow watch sent revision %d; want %d", b.Revision, written[n])
		}
		if len(b.Events) != 1 || (n >= 10) != (len(b.Events[0].Prev) == len(big)) {
			t.Fatalf("slow watch sent revision %d without the value before", b.Revision)
		}
		n++
	}
	if n == len(written) {
		t.Fatalf("slow watch sent all %d revisions; want it to end", n)
	}
	_, revision, _, err := s.List(t.Context(), "", "", 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Watch(t.Context(), "", revision)
	if err != nil {
		t.Fatal(err)
	}
	if at := put(t, s, "a", "w"); (<-again).Revision != at {
		t.Error("watch from the new listing missed a write")
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestHistoryIsCompactedByOneReplica(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	cfg.KeepHistory = time.Second
	s, other := open(t, cfg), open(t, cfg)
	defer s.Close()
	defer other.Close()
	begin := put(t, s, "a", "v")
	eventually(t, "the first revision is compacted", func() error {
		put(t, s, "a", "v")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if _, err := s.Watch(ctx, "", begin); !errors.Is(err, store.ErrCompacted) {
			return fmt.Errorf("watch = %v", err)
		}
		return nil
	})
	_, revision, _, err := s.List(t.Context(), "", "", 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := s.Watch(ctx, "", revision); err != nil {
		t.Errorf("Watch of what is new = %v", err)
	}
	// Who compacts does it under the lease that it leads under otherwise.
	for i, s := range []store.Store{s, other} {
		if _, err := s.Campaign(t.Context(), fmt.Sprint("of replica ", i), store.CampaignTTL); err != nil {
			t.Fatal(err)
		}
	}
	if leases, err := e.Client().Leases(t.Context()); err != nil || len(leases.Leases) != 2 {
		t.Errorf("%d leases, %v; want one for each store", len(leases.Leases), err)
	}
}

func TestDamagedValuesAreNotServed(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	s := open(t, cfg)
	defer s.Close()
	begin := put(t, s, "a", "the value")
	put(t, s, "b", "another")
	client := e.Client()
	raw, err := client.Get(t.Context(), cfg.Prefix+"k/a")
	if err != nil || len(raw.Kvs) != 1 {
		t.Fatal(raw, err)
	}
	good := raw.Kvs[0].Value
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if _, err := client.Put(t.Context(), cfg.Prefix+"k/a", string(bad)); err != nil {
			t.Fatal(err)
		}
		if kv, _, err := s.Get(t.Context(), "a"); err == nil || errors.Is(err, store.ErrNotFound) {
			t.Errorf("bit flipped in byte %d: Get = %v, %v; want an error", i, kv, err)
		}
	}
	// A good record in the place of another is damage, too.
	if _, err := client.Put(t.Context(), cfg.Prefix+"k/b", string(good)); err != nil {
		t.Fatal(err)
	}
	if kv, _, err := s.Get(t.Context(), "b"); err == nil {
		t.Errorf("Get = %v; want an error", kv)
	}
	if _, _, _, err := s.List(t.Context(), "", "", 10, 0); err == nil {
		t.Error("a listing with damaged values was answered")
	}
	batches, err := s.Watch(t.Context(), "", begin)
	if err != nil {
		t.Fatal(err)
	}
	if b := <-batches; b.Events[0].KV.Key != "b" {
		t.Errorf("watch sent %v; want b", b)
	}
	if b, open := <-batches; open {
		t.Errorf("watch sent %v; want its end", b)
	}
}

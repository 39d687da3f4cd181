package etcd_test

// Members that die, hang or are cut off, under load: what was acknowledged is
// there, watches see all of it in order, and writes soon go on.

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

// long says that the long forms of the tests are wanted.
func long() bool { return os.Getenv("MERLON_LONG") != "" }

// load writes until it is stopped.
type load struct {
	t     testing.TB
	store store.Store
	stop  chan struct{}
	wg    sync.WaitGroup
	batch <-chan store.Batch

	mu      sync.Mutex
	acked   map[string]uint64 // guarded by mu; keys and their revisions
	unknown map[string]bool   // guarded by mu; keys whose outcome is unknown
	last    time.Time         // guarded by mu; of the last acknowledgement
	stall   time.Duration     // guarded by mu; the longest time without one
}

func startLoad(t testing.TB, cfg etcd.Config) *load {
	t.Helper()
	s := open(t, cfg)
	t.Cleanup(func() { s.Close() })
	l := &load{t: t, store: s, stop: make(chan struct{}), acked: make(map[string]uint64), unknown: make(map[string]bool), last: time.Now()}
	revision, err := s.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if l.batch, err = s.Watch(t.Context(), "", revision); err != nil {
		t.Fatal(err)
	}
	for w := range 4 {
		l.wg.Go(func() { l.write(w) })
	}
	return l
}

func (l *load) write(w int) {
	for i := 0; ; i++ {
		select {
		case <-l.stop:
			return
		case <-time.After(2 * time.Millisecond):
		}
		key := fmt.Sprintf("k/%d/%06d", w, i)
		res, err := l.store.Txn(context.Background(), []store.Cmp{{Key: key}}, []store.Op{store.Put(key, []byte(key))}, nil)
		l.note(key, res, err)
	}
}

func (l *load) note(key string, res store.TxnResult, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case errors.Is(err, store.ErrUnavailable):
		l.unknown[key] = true
	case err != nil:
		l.t.Errorf("Txn = %v; want success or %v", err, store.ErrUnavailable)
	case !res.Succeeded:
		l.t.Errorf("Txn found %s, which only it writes: it was carried out twice", key)
	default:
		l.acked[key] = res.Revision
		l.stall = max(l.stall, time.Since(l.last))
		l.last = time.Now()
	}
}

// more waits for n more acknowledgements.
func (l *load) more(n int) {
	l.t.Helper()
	count := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.acked)
	}
	for want, late := count()+n, time.After(patience); count() < want; {
		select {
		case <-late:
			l.t.Fatalf("no %d writes within %s", n, patience)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// patience bounds everything that must happen.
const patience = 30 * time.Second

// check ends the load and compares what it was told with what is there and
// with what the watch saw.
func (l *load) check() {
	t := l.t
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	got := make(map[string]uint64)
	var after string
	var revision uint64
	for more := true; more; {
		var kvs []store.KV
		var err error
		if kvs, revision, more, err = l.store.List(t.Context(), "", after, 1000, revision); err != nil {
			t.Fatal(err)
		}
		for _, kv := range kvs {
			got[kv.Key], after = kv.ModRevision, kv.Key
		}
	}
	for key, revision := range l.acked {
		if got[key] != revision {
			t.Errorf("%s was acknowledged at revision %d and is at %d", key, revision, got[key])
		}
	}
	for key := range got {
		if _, ok := l.acked[key]; !ok && !l.unknown[key] {
			t.Errorf("%s is there and was never written", key)
		}
	}
	seen := make(map[string]uint64)
	last := uint64(0)
	for late := time.After(patience); len(seen) < len(got); {
		select {
		case b, open := <-l.batch:
			if !open || b.Revision <= last {
				t.Fatalf("watch: open %v, revision %d after %d", open, b.Revision, last)
			}
			last = b.Revision
			for _, ev := range b.Events {
				seen[ev.KV.Key] = b.Revision
			}
		case <-late:
			t.Fatalf("watch saw %d of %d keys", len(seen), len(got))
		}
	}
	for key, revision := range got {
		if seen[key] != revision {
			t.Errorf("watch saw %s at revision %d; want %d", key, seen[key], revision)
		}
	}
	t.Logf("%d acknowledged, %d unknown, longest stall %s", len(l.acked), len(l.unknown), l.stall)
}

// atLeader aims the store at the leader, which the tests then hurt.
func atLeader(e *stage.Etcd, leader *stage.EtcdMember) etcd.Config {
	cfg := config(e)
	i := slices.Index(e.Members, leader)
	cfg.Endpoints[0], cfg.Endpoints[i] = cfg.Endpoints[i], cfg.Endpoints[0]
	return cfg
}

func TestLeaderIsKilled(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 3)
	leader := e.Leader()
	l := startLoad(t, atLeader(e, leader))
	l.more(50)
	leader.Kill()
	l.more(200)
	leader.Restart()
	l.more(50)
	l.check()
}

func TestLeaderIsPaused(t *testing.T) {
	t.Parallel()
	pause := 6 * time.Second
	if long() {
		pause = 30 * time.Second
	}
	e := stage.StartEtcd(t, 3)
	leader := e.Leader()
	l := startLoad(t, atLeader(e, leader))
	l.more(50)
	leader.Pause()
	resume := time.After(pause)
	l.more(200)
	<-resume
	leader.Resume()
	l.more(50)
	l.check()
}

func TestLeaderIsCutOff(t *testing.T) {
	t.Parallel()
	loseLeader(t, func(n *stage.Network, _ *stage.Etcd, leader *stage.EtcdMember) { n.Partition(leader.Space) })
}

// The leader still answers us, but not its followers.
func TestLeaderLosesItsFollowers(t *testing.T) {
	t.Parallel()
	loseLeader(t, func(n *stage.Network, e *stage.Etcd, leader *stage.EtcdMember) {
		for _, m := range e.Members {
			if m != leader {
				n.Cut(leader.Space, m.Space)
			}
		}
	})
}

// loseLeader writes while the network does what cut says, and after it healed.
func loseLeader(t *testing.T, cut func(*stage.Network, *stage.Etcd, *stage.EtcdMember)) {
	if !stage.InNamespace(t) {
		return
	}
	n := stage.NewNetwork(t)
	e := n.StartEtcd(3)
	leader := e.Leader()
	l := startLoad(t, atLeader(e, leader))
	l.more(50)
	cut(n, e, leader)
	l.more(200)
	n.Heal(leader.Space)
	l.more(50)
	l.check()
}

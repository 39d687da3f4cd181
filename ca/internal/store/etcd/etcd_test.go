package etcd_test

// The conformance suite on a real etcd of one member, and of three.

import (
	"context"
	"flag"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/ca/internal/store/storetest"
	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("rapid.checks", "25") // each step goes to disk and back
	flag.Set("test.parallel", "6") // they wait more than they work
	goleak.VerifyTestMain(tidy{m})
}

// tidy removes what was built for the tests.
type tidy struct{ m *testing.M }

func (t tidy) Run() int {
	defer stage.RemoveBins()
	return t.m.Run()
}

func TestConformance(t *testing.T) {
	t.Parallel()
	storetest.Run(t, backend(stage.StartEtcd(t, 1)))
}

func TestConformanceOnThreeMembers(t *testing.T) {
	t.Parallel()
	storetest.Run(t, backend(stage.StartEtcd(t, 3)))
}

// prefixes counts the stores, each of which has a prefix of its own.
var prefixes atomic.Int64

func config(e *stage.Etcd) etcd.Config {
	return etcd.Config{
		Endpoints: e.Endpoints(), CAFile: e.Files.CA, CertFile: e.Files.Cert, KeyFile: e.Files.Key,
		Prefix: fmt.Sprintf("/test-%d/", prefixes.Add(1)),
	}
}

func open(t testing.TB, cfg etcd.Config) store.Store {
	t.Helper()
	s, err := etcd.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func backend(e *stage.Etcd) storetest.Backend {
	at := make(map[store.Store]etcd.Config)
	start := func(t testing.TB, cfg etcd.Config) store.Store {
		s := open(t, cfg)
		at[s] = cfg
		return s
	}
	return storetest.Backend{
		Open: func(t testing.TB) store.Store { return start(t, config(e)) },
		Reopen: func(t testing.TB, s store.Store) store.Store {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			return start(t, at[s])
		},
		Compact: func(t testing.TB, s store.Store) {
			put(t, s, "compact/", "")
			compact(t, e)
		},
	}
}

// compact makes etcd forget everything but its latest revision.
func compact(t testing.TB, e *stage.Etcd) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client := e.Client()
	res, err := client.Get(ctx, "any")
	if err == nil {
		_, err = client.Compact(ctx, res.Header.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, s store.Store, key, value string) uint64 {
	t.Helper()
	res, err := s.Txn(t.Context(), nil, []store.Op{store.Put(key, []byte(value))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

// A record that somebody damaged in etcd.

package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

// The picture stays as it was and says so, until the record is gone; then it
// has everything, also what was written meanwhile.
func TestDamagedRecordIsAFaultUntilItIsGone(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	st, err := etcd.Open(t.Context(), etcd.Config{
		Endpoints: e.Endpoints(), CAFile: e.Files.CA, CertFile: e.Files.Cert, KeyFile: e.Files.Key, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	r := start(t, st)
	before := put(t, st, r, nodeA)

	const key = "/merlon/k/" + EntryPrefix + "zzz"
	client := e.Client()
	if _, err := client.Put(t.Context(), key, "garbage"); err != nil {
		t.Fatal(err)
	}
	stage.Eventually(t, "the picture has a fault", func() error {
		if err := r.Fault(); !errors.Is(err, store.ErrDamaged) || !strings.Contains(err.Error(), EntryPrefix+"zzz") {
			return fmt.Errorf("Fault() = %v", err)
		}
		return nil
	})
	res, err := st.Txn(t.Context(), nil, []store.Op{store.Put("meanwhile", nil)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := r.Wait(ctx, res.Revision); err == nil {
		t.Error("Wait() for what lies behind a damaged record = nil")
	}
	if err := r.Fault(); err == nil {
		t.Error("the fault went away by itself")
	}
	if _, ok := r.Entry(before.ID); !ok {
		t.Error("the last good picture is gone")
	}

	if _, err := client.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	after := put(t, st, r, nodeA)
	stage.Eventually(t, "the fault ends", r.Fault)
	for _, want := range []string{before.ID, after.ID} {
		if _, ok := r.Entry(want); !ok {
			t.Errorf("entry %s is not in the picture", want)
		}
	}
}

// Nobody waits for ever for a picture that does not move.
func TestWaitGivesUp(t *testing.T) {
	st := openStore(t)
	r, err := Open(t.Context(), st, slog.New(slog.DiscardHandler)) // and no Run
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := r.Wait(t.Context(), r.Revision()+1); !errors.Is(err, ErrBehind) {
		t.Errorf("Wait() = %v after %v; want %v", err, time.Since(began), ErrBehind)
	}
}

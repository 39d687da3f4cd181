// Generations of policy bundles, over the real store.

package release

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

const maxBytes = 2 << 20

// newPublisher signs by writing the seal before the bytes.
func newPublisher(t *testing.T) (*Publisher, store.Store) {
	t.Helper()
	st, err := badger.Open(t.TempDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return New(Options{
		Store: st, Log: slog.New(slog.DiscardHandler), MaxBytes: maxBytes,
		Check: func(unsigned []byte) error {
			if bytes.HasPrefix(unsigned, []byte("bad")) {
				return errors.New("grants.yaml:1: no")
			}
			return nil
		},
		Sign: func(unsigned []byte, seal Seal) ([]byte, error) {
			return append(fmt.Appendf(nil, "%s %d%s\n", seal.Name, seal.Generation, mark(seal.Candidate)), unsigned...), nil
		},
		Unsign: func(signed []byte, name string, candidate bool) ([]byte, error) {
			seal, unsigned, ok := bytes.Cut(signed, []byte("\n"))
			if !ok || !bytes.HasPrefix(seal, []byte(name+" ")) || candidate != bytes.HasSuffix(seal, []byte(mark(true))) {
				return nil, errors.New("not signed")
			}
			return unsigned, nil
		},
	}), st
}

func mark(candidate bool) string {
	if candidate {
		return " candidate"
	}
	return ""
}

// restored is a store as it goes on after a loss.
type restored struct{ store.Store }

func (r restored) Revision(ctx context.Context) (uint64, error) {
	revision, err := r.Store.Revision(ctx)
	return store.NextEpoch(revision) + 7, err
}

func (r restored) List(ctx context.Context, prefix, after string, limit int, at uint64) ([]store.KV, uint64, bool, error) {
	kvs, revision, more, err := r.Store.List(ctx, prefix, after, limit, at)
	return kvs, store.NextEpoch(revision) + 7, more, err
}

// Agents take no lower generation, and do not know which one is lost.
func TestRestoredStoreGivesEachBundleAGenerationOfItsEpoch(t *testing.T) {
	p, st := newPublisher(t)
	ctx, now := t.Context(), time.Now()
	for _, name := range []string{"main", "main", "other"} {
		if _, err := p.Publish(ctx, name, []byte("content of "+name)); err != nil {
			t.Fatal(err)
		}
	}
	if renewed, err := p.EnterEpoch(ctx, now); err != nil || len(renewed) != 0 {
		t.Fatalf("in a store that lost nothing: %d renewed, %v", len(renewed), err)
	}
	opts, epoch := p.opts, store.NextEpoch(1)
	opts.Store = restored{st}
	p = New(opts)
	for round, want := range []int{2, 0} {
		if renewed, err := p.EnterEpoch(ctx, now); err != nil || len(renewed) != want {
			t.Fatalf("round %d: %d renewed, %v; want %d", round, len(renewed), err, want)
		}
	}
	if renewed, err := p.Renew(ctx, now); err != nil || len(renewed) != 0 {
		t.Errorf("Renew: %d renewed, %v; want nothing left", len(renewed), err)
	}
	for _, name := range []string{"main", "other"} {
		signed, head, err := New(opts).Current(ctx, name)
		if err != nil || head.Generation != epoch || string(signed) != fmt.Sprintf("%s %d\ncontent of %s", name, epoch, name) {
			t.Errorf("%s: %+v, %q, %v; want its content as generation %d", name, head, signed, err, epoch)
		}
	}
	for name, want := range map[string]uint64{"main": epoch + 1, "new": epoch} {
		if head, err := p.Publish(ctx, name, []byte("x")); err != nil || head.Generation != want {
			t.Errorf("the next push of %s: %+v, %v; want generation %d", name, head, err, want)
		}
	}
}

func TestGenerationsRiseAndTheLastIsServed(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	if _, _, err := p.Current(ctx, "main"); !errors.Is(err, ErrNone) {
		t.Fatalf("before the first push: %v; want ErrNone", err)
	}
	large := make([]byte, maxBytes) // several chunks
	rand.Read(large)
	for i, body := range [][]byte{[]byte("one"), large, []byte("three"), []byte("four")} {
		head, err := p.Publish(ctx, "main", body)
		if err != nil || head.Generation != uint64(i+1) {
			t.Fatalf("push %d: %+v, %v", i, head, err)
		}
		fresh := New(p.opts) // without the cache
		signed, got, err := fresh.Current(ctx, "main")
		if err != nil || got.ETag() != head.ETag() || !bytes.HasSuffix(signed, body) || !bytes.HasPrefix(signed, fmt.Appendf(nil, "main %d\n", i+1)) {
			t.Fatalf("push %d: Current = %d bytes, %+v, %v", i, len(signed), got, err)
		}
	}
	if other, err := p.Publish(ctx, "other", []byte("x")); err != nil || other.Generation != 1 {
		t.Errorf("another bundle: %+v, %v; want its own generation 1", other, err)
	}
	blobs, err := p.blobs(ctx)
	if err != nil || len(blobs) != 5 {
		t.Errorf("stored blobs %v, %v; want the four of main and one of other", blobs, err)
	}
}

func TestRefusedBundleChangesNothing(t *testing.T) {
	p, st := newPublisher(t)
	before, err := st.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var refused *RefusedError
	if _, err := p.Publish(t.Context(), "main", []byte("bad")); !errors.As(err, &refused) || !strings.Contains(err.Error(), "grants.yaml:1") {
		t.Errorf("bad bundle: %v", err)
	}
	if _, err := p.Publish(t.Context(), "main", make([]byte, maxBytes+1)); !errors.As(err, &refused) {
		t.Errorf("large bundle: %v", err)
	}
	for _, name := range []string{"", "A", "a/b", "..", ".", "-a", "a\n", strings.Repeat("a", 65)} {
		var invalid *entry.InvalidError
		if _, err := p.Publish(t.Context(), name, []byte("x")); !errors.As(err, &invalid) {
			t.Errorf("name %q: %v", name, err)
		}
	}
	if after, err := st.Revision(t.Context()); err != nil || after != before {
		t.Errorf("revision %d, %v; want %d as before", after, err, before)
	}
}

func TestParallelPushesEachGetAGeneration(t *testing.T) {
	p, _ := newPublisher(t)
	const pushes = 6
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[uint64]bool)
	for i := range pushes {
		wg.Go(func() {
			head, err := p.Publish(context.Background(), "main", fmt.Appendf(nil, "%d", i))
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[head.Generation] {
				t.Errorf("push %d: %+v, %v", i, head, err)
				return
			}
			seen[head.Generation] = true
		})
	}
	wg.Wait()
	if _, head, err := p.Current(t.Context(), "main"); err != nil || head.Generation != pushes {
		t.Errorf("Current = %+v, %v; want generation %d", head, err, pushes)
	}
}

func TestPruneRemovesOldOrphansOnly(t *testing.T) {
	p, _ := newPublisher(t)
	ctx := t.Context()
	if _, err := p.Publish(ctx, "main", []byte("kept")); err != nil {
		t.Fatal(err)
	}
	orphan := newRelease(Pushed, time.Now())
	if err := p.writeBlob(ctx, "main", &orphan, []byte("never came to its head")); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		now  time.Time
		want int
	}{{time.Now(), 2}, {time.Now().Add(2 * orphanAge), 1}} {
		if err := p.Prune(ctx, step.now); err != nil {
			t.Fatal(err)
		}
		if blobs, err := p.blobs(ctx); err != nil || len(blobs) != step.want {
			t.Errorf("after Prune at %s: %v, %v; want %d blobs", step.now, blobs, err, step.want)
		}
	}
	if signed, _, err := New(p.opts).Current(ctx, "main"); err != nil || !bytes.HasSuffix(signed, []byte("kept")) {
		t.Errorf("Current = %q, %v", signed, err)
	}
}

func TestDamagedBundleIsNotServed(t *testing.T) {
	p, st := newPublisher(t)
	head, err := p.Publish(t.Context(), "main", []byte("good"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put(chunkKey(head.Blob, 0), []byte("evil"))}, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := New(p.opts).Current(t.Context(), "main"); err == nil {
		t.Error("Current served bytes that were not signed")
	}
}

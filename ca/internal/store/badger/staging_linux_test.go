package badger

// Imports onto disks that are too small: refused or broken off with the reason,
// never a SIGBUS, and with nothing left behind.

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
)

// manyPairs are n MiB of pairs; at calls something on the way.
func manyPairs(n int, at map[int]func()) iter.Seq2[store.KV, error] {
	value := bytes.Repeat([]byte("v"), 64<<10)
	return func(yield func(store.KV, error) bool) {
		for i := range n * 16 {
			if call := at[i/16]; call != nil && i%16 == 0 {
				call()
			}
			if !yield(store.KV{Key: fmt.Sprintf("k/%06d", i), Value: value, ModRevision: 1}, nil) {
				return
			}
		}
	}
}

func wantShort(t *testing.T, what string, err error, dir string) {
	t.Helper()
	if _, short := errors.AsType[*shortError](err); !short || !strings.Contains(err.Error(), "disk_reserve_mib") {
		t.Errorf("%s: %v; want to hear what the disk has too little of", what, err)
	}
	if files, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(files) != 0 {
		t.Errorf("%s left %q, %v", what, files, err)
	}
}

func TestImportOntoASmallDisk(t *testing.T) {
	opts := Options{ReserveBytes: 8 << 20}
	dir := filepath.Join(mountSmall(t, "size=30m"), "store")
	wantShort(t, "an import onto 30 MiB", Import(dir, opts, 5, manyPairs(100, nil)), dir)

	dir = filepath.Join(mountSmall(t, "size=200m"), "store")
	wantShort(t, "an import that does not end", Import(dir, opts, 5, manyPairs(400, nil)), dir)
	opts.ImportBytes = 100 << 20
	wantShort(t, "an import that will not fit", Import(dir, opts, 5, manyPairs(1, map[int]func(){0: func() { t.Error("it has begun") }})), dir)
}

// Others can eat the reserve between the look and the write: then a table waits.
func TestTableOfAnImportWaitsForSpace(t *testing.T) {
	disk := mountSmall(t, "size=240m")
	dir := filepath.Join(disk, "store")
	ballast := filepath.Join(disk, "ballast")
	before := guarded.Load()
	fill := func() {
		f, err := os.Create(ballast)
		if err != nil {
			t.Error(err)
			return
		}
		for chunk := make([]byte, 1<<20); err == nil; {
			_, err = f.Write(chunk)
		}
		f.Close()
		time.AfterFunc(500*time.Millisecond, func() { os.Remove(ballast) })
	}
	err := Import(dir, Options{ReserveBytes: 8 << 20}, 5, manyPairs(40, map[int]func(){11: fill}))
	if err != nil {
		wantShort(t, "an import onto a disk that fills up", err, dir)
	}
	if guarded.Load() == before {
		t.Error("nothing was mapped through the guard")
	}
}

// A store that is accepted is staged too: the CA says so and leaves it as it was.
func TestAcceptOnAFullDisk(t *testing.T) {
	disk := mountSmall(t, "size=200m")
	dir := filepath.Join(disk, "store")
	if err := Import(dir, Options{ReserveBytes: 8 << 20}, 5, manyPairs(40, nil)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(disk, "ballast"), make([]byte, 100<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(dir, Options{AcceptOlder: 5, ReserveBytes: 8 << 20})
	if err == nil || !strings.Contains(err.Error(), "disk_reserve_mib") {
		t.Fatalf("Open = %v; want to hear that there is no room", err)
	}
	if err := os.Remove(filepath.Join(disk, "ballast")); err != nil {
		t.Fatal(err)
	}
	if r, err := Verify(dir); err != nil || r.Damage != nil || r.Revision != 5 || r.Keys != 640 {
		t.Errorf("afterwards %+v, %v", r, err)
	}
}

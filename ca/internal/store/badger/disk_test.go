package badger_test

// A disk that fills up under the store: a child process writes to a tmpfs at
// full speed while this one fills and empties it. The child must never die,
// must say why it writes nothing, and must keep what it has acknowledged.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/integration/stage"
)

const diskChildDir = "MERLON_TEST_FULL_DISK_DIR"

// fullDiskOptions has a history so short that compactions run all the time.
var fullDiskOptions = badger.Options{KeepRevisions: 700, ReserveBytes: 32 << 20}

// runDiskChild is the whole life of a child process that writes until it is
// killed. Elsewhere it returns.
func runDiskChild() {
	dir := os.Getenv(diskChildDir)
	if dir == "" {
		return
	}
	opts := fullDiskOptions
	opts.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	s, err := badger.Open(dir, opts)
	if err == nil {
		err = writeThroughFullDisks(s)
	}
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1) //nolint:forbidigo // the main of a child process
}

// writeThroughFullDisks overwrites a few hundred keys for ever and reports each
// write: "KEY NUMBER" once it is acknowledged, "full" while it is refused. It
// returns on any other error.
func writeThroughFullDisks(s *badger.Store) error {
	fmt.Println("open")
	failed := make(chan error)
	for w := range 16 {
		go func() {
			value := strings.Repeat("x", 6000)
			for i := 1; ; {
				key := fmt.Sprintf("%d/%d", w, i%32)
				_, err := s.Txn(context.Background(), nil, []store.Op{store.Put(key, []byte(strconv.Itoa(i)+" "+value))}, nil)
				switch {
				case err == nil:
					fmt.Println(key, i)
					i++
				case errors.Is(err, store.ErrReadOnly):
					fmt.Println("full", err)
					time.Sleep(5 * time.Millisecond)
				default:
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

// diskChild is a child whose report is read as it comes.
type diskChild struct {
	*child
	acknowledged map[string]int
	acks, full   atomic.Int64
	reason       atomic.Pointer[string]
	ended        chan struct{} // closed when all of its report has been read
}

func startDiskChild(t testing.TB, dir string) *diskChild {
	t.Helper()
	c := &diskChild{child: startChildWith(t, diskChildDir+"="+dir), acknowledged: make(map[string]int), ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		for c.lines.Scan() {
			key, rest, _ := strings.Cut(c.lines.Text(), " ")
			if key == "full" {
				c.full.Add(1)
				c.reason.Store(&rest)
				continue
			}
			if n, err := strconv.Atoi(rest); err == nil {
				c.acknowledged[key] = max(n, c.acknowledged[key])
				c.acks.Add(1)
			}
		}
	}()
	return c
}

// await waits until the child has reported n more of what counter counts.
func (c *diskChild) await(t testing.TB, what string, counter *atomic.Int64, n int64) {
	t.Helper()
	for want, end := counter.Load()+n, time.After(20*time.Second); counter.Load() < want; {
		select {
		case <-c.ended:
			t.Fatalf("the child has died after %d acknowledged writes and %d refused", c.acks.Load(), c.full.Load())
		case <-end:
			t.Fatalf("the child reports no more %s after %d acknowledged writes and %d refused", what, c.acks.Load(), c.full.Load())
		case <-time.After(time.Millisecond):
		}
	}
}

// stop sends SIGKILL and waits until all of the report has been read.
func (c *diskChild) stop(t testing.TB) {
	t.Helper()
	if err := c.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	<-c.ended
	_ = c.cmd.Wait() // killed
}

// filler takes the space of a disk in one of several ways, as fast as it can.
type filler func(path string) error

func writeUntilFull(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	chunk := make([]byte, 1<<20)
	for {
		if _, err := f.Write(chunk); err != nil {
			return err
		}
	}
}

func allocateAll(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for size := int64(256 << 20); size > 4096; size /= 2 { // all of it, down to the last page
		for end := int64(0); ; end += size {
			info, err := f.Stat()
			if err != nil {
				return err
			}
			if err := syscall.Fallocate(int(f.Fd()), 0, info.Size(), size); err != nil {
				break
			}
		}
	}
	return syscall.ENOSPC
}

func TestFullDiskNeverKillsTheStore(t *testing.T) {
	disk := stage.SmallDisk(t, "size=288m")
	dir := filepath.Join(disk, "store")
	c := startDiskChild(t, dir)
	const rounds = 6
	for round := range rounds {
		c.await(t, "acknowledged writes", &c.acks, 200+int64(round)*97)
		path, fill := filepath.Join(disk, "filler"), filler(writeUntilFull)
		if round%2 == 1 {
			fill = allocateAll
		}
		if err := fill(path); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("filling the disk: %v", err)
		}
		c.await(t, "refused writes", &c.full, 20)
		if reason := *c.reason.Load(); !strings.Contains(reason, "free some space") || !strings.Contains(reason, disk) {
			t.Fatalf("a write on a full disk says %q", reason)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	c.await(t, "acknowledged writes", &c.acks, 100)
	c.stop(t)
	checkNewest(t, dir, c.acknowledged)
}

// TestReserveStaysFree: writes stop while there is space still, and go on when
// there is a little more than the reserve.
func TestReserveStaysFree(t *testing.T) {
	disk := stage.SmallDisk(t, "size=256m")
	const reserve = 64 << 20
	s := open(t, filepath.Join(disk, "store"), badger.Options{ReserveBytes: reserve})
	defer s.Close()
	write := func() error {
		_, err := s.Txn(t.Context(), nil, []store.Op{store.Put("a", []byte("v"))}, nil)
		return err
	}
	if err := write(); err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(disk, "filler")
	for _, step := range []struct {
		free    int64
		refused bool
	}{
		{reserve + 1<<20, false},
		{reserve - 1<<20, true},
		{reserve + 1<<20, true}, // a little more first, or each write would decide anew
		{reserve + reserve/16 + 1<<20, false},
		{reserve + 1<<20, false},
	} {
		leaveFree(t, disk, filler, step.free)
		err := write()
		if step.refused && (!errors.Is(err, store.ErrReadOnly) || !strings.Contains(err.Error(), "below its reserve of")) || !step.refused && err != nil {
			t.Errorf("with %d bytes free: %v; want it refused: %v", step.free, err, step.refused)
		}
		if kv, _, err := s.Get(t.Context(), "a"); err != nil || string(kv.Value) != "v" {
			t.Errorf("with %d bytes free a read gives %+v, %v", step.free, kv, err)
		}
	}
}

// leaveFree gives a file such a size that so much of its disk is free.
func leaveFree(t *testing.T, disk, filler string, free int64) {
	t.Helper()
	if err := os.Remove(filler); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var now syscall.Statfs_t
	if err := syscall.Statfs(disk, &now); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filler)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(syscall.Fallocate(int(f.Fd()), 0, 0, int64(now.Bavail)*now.Bsize-free), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// checkNewest holds what is in the store against what was acknowledged.
func checkNewest(t *testing.T, dir string, acknowledged map[string]int) {
	t.Helper()
	s := open(t, dir, fullDiskOptions)
	defer s.Close()
	for key, want := range acknowledged {
		kv, _, err := s.Get(t.Context(), key)
		if err != nil {
			t.Fatalf("acknowledged write %d of %s: %v", want, key, err)
		}
		number, _, _ := strings.Cut(string(kv.Value), " ")
		if got, err := strconv.Atoi(number); err != nil || got < want {
			t.Fatalf("%s is at write %s, and %d was acknowledged", key, number, want)
		}
	}
}

// takeInodes makes files until no more can be made.
func takeInodes(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for i := 0; ; i++ {
		f, err := os.Create(filepath.Join(dir, strconv.Itoa(i)))
		if err != nil {
			return err
		}
		f.Close()
	}
}

func TestDiskWithoutInodesLosesNothing(t *testing.T) {
	disk := stage.SmallDisk(t, "size=400m,nr_inodes=40000")
	dir := filepath.Join(disk, "store")
	c := startDiskChild(t, dir)
	c.await(t, "acknowledged writes", &c.acks, 1000)
	path := filepath.Join(disk, "files")
	if err := takeInodes(path); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("taking all inodes: %v", err)
	}
	c.await(t, "refused writes", &c.full, 20)
	if reason := *c.reason.Load(); !strings.Contains(reason, "inodes free") {
		t.Fatalf("a write on a disk without inodes says %q", reason)
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	c.await(t, "acknowledged writes", &c.acks, 200)
	c.stop(t)
	checkNewest(t, dir, c.acknowledged)
}

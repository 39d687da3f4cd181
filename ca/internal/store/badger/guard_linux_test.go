package badger

// What the guard takes for granted of Badger and of golang.org/x/sys/unix.

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bdg "github.com/dgraph-io/badger/v4"
	"golang.org/x/sys/unix"

	"merlon.dev/ca/internal/store"
)

func TestBadgerMapsThroughTheGuard(t *testing.T) {
	before := guarded.Load()
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	if n := guarded.Load() - before; n < 2 {
		t.Fatalf("%d mappings went through the guard; want those of a log and of the value log", n)
	}
	txn(t, s, store.Put("a", []byte("1")))
	for _, number := range []int{1, 2} { // the log in use, and the next one
		var st unix.Stat_t
		if err := unix.Stat(walPath(dir, number), &st); err != nil {
			t.Fatal(err)
		}
		if got := st.Blocks * 512; got < walBytes {
			t.Errorf("log %d has blocks for %d bytes; want %d", number, got, walBytes)
		}
	}
	if s.guard.next == nil || s.guard.next.number != 2 {
		t.Errorf("the next log is %+v; want number 2", s.guard.next)
	}
}

func TestNextLogIsTakenUpAndReplaced(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	value := strings.Repeat("x", 60<<10)
	for i := 0; s.guard.next == nil || s.guard.next.number < 4; i++ {
		if i > 5000 {
			t.Fatalf("the next log is still %+v", s.guard.next)
		}
		txn(t, s, store.Put(fmt.Sprint(i%10), []byte(value)))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*"+memExt)); err != nil || len(left) > 0 {
		t.Errorf("logs left behind by Close: %v, %v", left, err)
	}
}

// The last batch before Close turned to the next log, which Badger then removes
// as it closes.
func TestCloseRightAfterTurningToTheNextLog(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	value := strings.Repeat("x", 60<<10)
	for i := 0; ; i++ {
		if i > 5000 {
			t.Fatal("Badger never turned to the next log")
		}
		txn(t, s, store.Put(fmt.Sprint(i%10), []byte(value)))
		info, err := s.guard.next.file.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 0 {
			break
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close() = %v; want nil", err)
	}
}

// interrupted does something right before the first table of a compaction is
// made, and then lets the gate decide.
type interrupted struct {
	gate
	first *sync.Once
	do    func()
}

func (i interrupted) Debugf(format string, args ...any) {
	if strings.HasPrefix(format, beforeTable) {
		i.first.Do(i.do)
	}
	i.gate.Debugf(format, args...)
}

// Badger takes a table that a compaction cannot make for one that is made, and
// deletes what should have gone into it.
func TestCompactionWaitsForInodes(t *testing.T) {
	disk := mountSmall(t, "size=128m,nr_inodes=2000")
	quiet := slog.New(slog.DiscardHandler)
	dir, files := filepath.Join(disk, "db"), filepath.Join(disk, "files")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(files, 0o700)); err != nil {
		t.Fatal(err)
	}
	g, err := newGuard(dir, 1, quiet)
	if err != nil {
		t.Fatal(err)
	}
	var taken atomic.Bool
	interrupt := interrupted{gate{logger{quiet}, g}, new(sync.Once), func() {
		taken.Store(true)
		for i := 0; ; i++ {
			f, err := os.Create(filepath.Join(files, fmt.Sprint(i)))
			if err != nil {
				return
			}
			f.Close()
		}
	}}
	opts := badgerOptions(dir, quiet).WithMemTableSize(1 << 20).WithSyncWrites(false).
		WithNumLevelZeroTables(1).WithNumLevelZeroTablesStall(2).WithValueThreshold(1 << 10)
	db, err := bdg.OpenManaged(opts.WithLogger(interrupt))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	write := func(i int) {
		txn := db.NewTransactionAt(uint64(i), true)
		if err := txn.Set(fmt.Append(nil, i), make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if err := txn.CommitAt(uint64(i)+1, nil); err != nil {
			t.Fatal(err)
		}
	}
	keys := 0
	for ; !taken.Load(); keys++ {
		if err := g.stock(); err != nil {
			break // just now
		}
		write(keys)
	}
	eventually(t, "a compaction waits", func() bool { return g.waiting.Load() > 0 })
	if err := os.RemoveAll(files); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it goes on", func() bool { return g.waiting.Load() == 0 && len(db.Tables()) > 0 && db.Levels()[0].NumTables <= 1 })
	view := db.NewTransactionAt(uint64(keys), false)
	defer view.Discard()
	for i := range keys {
		if _, err := view.Get(fmt.Append(nil, i)); err != nil {
			t.Fatalf("key %d: %v", i, err)
		}
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

// mountSmall mounts a tmpfs for this test.
func mountSmall(t *testing.T, options string) (dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	dir = t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestReadOnlyDiskIsNamed(t *testing.T) {
	disk := mountSmall(t, "size=128m")
	dir := filepath.Join(disk, "store")
	s, err := Open(dir, Options{ReserveBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err == nil {
		t.Error("the kernel makes a disk read-only below an open store: look what that does")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), "read-only file system") {
		t.Errorf("Open on a disk that is mounted read-only = %v", err)
	}
	g, err := newGuard(dir, 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.check(); err == nil || !strings.Contains(err.Error(), "mounted read-only") {
		t.Errorf("check of a disk that is mounted read-only = %v", err)
	}
}

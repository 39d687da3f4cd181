package audit

// A disk that fills up under the log: what is set aside carries issuance on,
// the rest is refused without harm, and with space it goes on.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/integration/stage"
)

// fill takes all space of the disk of dir, and returns what gives it back.
func fill(t testing.TB, dir string) (empty func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for chunk := make([]byte, 4096); err == nil; {
		_, err = f.Write(chunk)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// appendUntilFull appends issuances until there is no more room, and returns
// how many were acknowledged.
func appendUntilFull(t testing.TB, l *Log) (n int) {
	t.Helper()
	for ; n < 100_000; n++ {
		switch err := l.Append(t.Context(), Record{Type: Issue, Serial: fmt.Sprint(n)}); {
		case errors.Is(err, ErrFull):
			if !strings.Contains(err.Error(), "free some space") {
				t.Errorf("the refusal does not say what to do: %v", err)
			}
			return n
		case err != nil:
			t.Fatal(err)
		}
	}
	t.Fatal("a full disk takes everything")
	return 0
}

func TestIssuanceGoesOnInTheStretchOfAFullDisk(t *testing.T) {
	disk := stage.SmallDisk(t, "size=16m")
	path := filepath.Join(disk, "audit.log")
	l, err := Open(path, Options{ReserveBytes: 4 << 20}) // 256 KiB are set aside
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	appendRecord(t, l, Record{Type: Issue})
	total := 1
	for range 2 {
		empty := fill(t, disk)
		if err := l.Append(t.Context(), Record{Type: Issue}, Record{Type: Refuse}); !errors.Is(err, ErrFull) {
			t.Fatalf("a refusal on a full disk: %v; want %v", err, ErrFull)
		}
		if err := l.Fault(); err != nil {
			t.Errorf("Fault with room for issuance = %v", err)
		}
		n := appendUntilFull(t, l)
		if n < 400 {
			t.Errorf("%d issuances fit into what was set aside; want some hundred", n)
		}
		if err := l.Fault(); !errors.Is(err, ErrFull) {
			t.Errorf("Fault of a full log = %v", err)
		}
		total += n
		wantVerified(t, path, total)
		empty()
		if err := l.Fault(); err != nil {
			t.Errorf("Fault once there is space = %v", err)
		}
		appendRecord(t, l, Record{Type: Refuse})
		total++
		wantVerified(t, path, total)
	}
}

func TestStretchIsThereAfterAStartOnAFullDisk(t *testing.T) {
	disk := stage.SmallDisk(t, "size=16m")
	path := filepath.Join(disk, "audit.log")
	opts := Options{ReserveBytes: 4 << 20}
	l, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, disk)
	appendRecord(t, l, Record{Type: Issue})
	closeLog(t, l)
	if l, err = Open(path, opts); err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	appendRecord(t, l, Record{Type: Issue})
	wantVerified(t, path, 2)
}

// TestTreeWaitsForSpace: on a full disk the tree is not saved, and is not needed:
// checkpoints are signed, a crash loses nothing, and with space all is saved.
func TestTreeWaitsForSpace(t *testing.T) {
	disk := stage.SmallDisk(t, "size=16m")
	path := filepath.Join(disk, "audit.jsonl")
	key, opts := testKey(t), Options{ReserveBytes: 4 << 20}
	l := openSigned(t, path, key, opts)
	appendRecord(t, l, Record{Type: Issue})
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	appendRecord(t, l, Record{Type: Issue})
	empty := fill(t, disk)
	if err := l.save(); err != nil { // before a write has shown that the disk is low
		t.Fatal(err)
	}
	total := 2 + appendUntilFull(t, l)
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	if c, err := l.Checkpoint(); err != nil || c.Size != int64(total) {
		t.Fatalf("Checkpoint = %+v, %v; want %d records", c, err, total)
	}
	closeLog(t, l)
	if r, err := Verify(path); err != nil || r.Last != uint64(total) || r.Checkpoint.Size != 1 {
		t.Fatalf("Verify = %+v, %v; want %d records, one under the checkpoint", r, err, total)
	}
	l = openSigned(t, path, key, opts)
	if c, err := l.Checkpoint(); err != nil || c.Size != int64(total) {
		t.Fatalf("Checkpoint after a restart = %+v, %v; want %d records", c, err, total)
	}
	empty()
	appendRecord(t, l, Record{Type: Issue})
	closeLog(t, l)
	if r, err := Verify(path); err != nil || r.Checkpoint.Size != int64(total)+1 {
		t.Fatalf("Verify with space = %+v, %v", r, err)
	}
}

// A limit on the size of files cuts a write off in the middle, as a full disk
// does where nothing can be set aside.
func TestWriteThatIsCutOffLeavesNothingBehind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	appendRecord(t, l, Record{Type: Issue})
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	limit := before
	limit.Cur = uint64(info.Size()) + 100
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	err = l.Append(t.Context(), Record{Type: Issue})
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, ErrFull) {
		t.Fatalf("Append beyond the limit = %v; want %v", err, ErrFull)
	}
	wantVerified(t, path, 1)
	appendRecord(t, l, Record{Type: Issue})
	wantVerified(t, path, 2)
}

// /dev/full takes nothing, and nothing can be cut off of it.
func TestRefusedWriteDoesNotStopTheLog(t *testing.T) {
	l := openLog(t, "/dev/full")
	for range 2 {
		if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), "no space left") {
			t.Fatalf("Append to a full disk = %v", err)
		}
	}
}

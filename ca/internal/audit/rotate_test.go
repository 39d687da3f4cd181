// Files that are rotated and dropped: the log stays whole.

package audit

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestRotationAndRetention: files are as large as they may be, the oldest go,
// a record says so, and what is left is proven.
func TestRotationAndRetention(t *testing.T) {
	key := testKey(t)
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	opts := Options{MaxBytes: 400 << 10}
	l := openSigned(t, path, key, opts)
	for range 40 {
		if err := l.Append(t.Context(), slices.Repeat([]Record{{Type: Issue, Serial: "a"}}, 100)...); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(l.save(), l.retain(t.Context(), time.Now())); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	r, err := Verify(path)
	if err != nil || r.First < 2 || r.Last != 4001 || r.Checkpoint.Size != 4001 {
		t.Fatalf("Verify = %+v, %v; want records from later than the first to 4001", r, err)
	}
	total := int64(0)
	segments, err := rotated(path)
	for _, s := range append(segments, segment{path: path}) {
		info, err := os.Stat(s.path)
		if err != nil || info.Size() > 100<<10 {
			t.Errorf("%s has %d bytes, %v", s.path, info.Size(), err)
		}
		total += info.Size()
	}
	if err != nil || len(segments) < 2 || total > opts.MaxBytes+(100<<10) {
		t.Errorf("%d files, %d bytes are kept, %v; want at most %d", len(segments), total, err, opts.MaxBytes)
	}
	l = openSigned(t, path, key, opts)
	appendRecord(t, l, Record{Type: Issue})
	c, err := l.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	checkProven(t, l, c, r.First)
	closeLog(t, l)
	// Who drops more than the record says is found.
	if err := os.Remove(segments[0].path); err != nil {
		t.Fatal(err)
	}
	if r, err := Verify(path); err == nil || !strings.Contains(err.Error(), "records are missing") {
		t.Fatalf("Verify without another file = %+v, %v", r, err)
	}
}

// checkProven proves every record from first on.
func checkProven(t testing.TB, l *Log, c Signed, first uint64) {
	t.Helper()
	n := 0
	for line, err := range Lines(l.path, first) {
		if err != nil {
			t.Fatal(err)
		}
		n++
		proof, err := l.tree.ProveLeaf(c.Size, int64(line.Seq)-1)
		if err == nil {
			err = c.Holds(line.Text, int64(line.Seq)-1, proof)
		}
		if err != nil {
			t.Fatalf("record %d: %v", line.Seq, err)
		}
	}
	if n != int(c.Size)-int(first)+1 {
		t.Fatalf("%d records from %d to %d", n, first, c.Size)
	}
}

func TestOldRecordsAreDropped(t *testing.T) {
	key := testKey(t)
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	opts := Options{MaxBytes: 100 << 20, MaxAge: 24 * time.Hour}
	l := openSigned(t, path, key, opts)
	appendRecord(t, l, Record{Type: Issue})
	l.writer.since = time.Now().Add(-4 * time.Hour) // the writer rests
	appendRecord(t, l, Record{Type: Issue})
	segments, err := rotated(path)
	if err != nil || len(segments) != 1 {
		t.Fatalf("%d old files, %v; want the one that was four hours old", len(segments), err)
	}
	if err := errors.Join(l.save(), l.retain(t.Context(), time.Now().Add(23*time.Hour))); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(segments[0].path); err != nil {
		t.Fatalf("a file that is not old is gone: %v", err)
	}
	if err := l.retain(t.Context(), time.Now().Add(25*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(segments[0].path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("an old file is there: %v", err)
	}
	if r, err := Verify(path); err != nil || r.First != 2 {
		t.Fatalf("Verify = %+v, %v", r, err)
	}
}

// TestHalfARotationIsUndone: a crash between its two steps leaves two names.
func TestHalfARotationIsUndone(t *testing.T) {
	key := testKey(t)
	path := signed(t, key, 5)
	if err := os.Link(path, rotatedPath(path, 1)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+nextSuffix, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := openSigned(t, path, key, Options{MaxBytes: 1})
	appendRecord(t, l, Record{Type: Issue}) // rotates
	closeLog(t, l)
	wantVerified(t, path, 6)
	if segments, err := rotated(path); err != nil || len(segments) != 1 {
		t.Fatalf("%v, %v; want one old file", segments, err)
	}
}

// TestRotationThatFailsLeavesTheLogWhole: the log grows on in its file.
func TestRotationThatFailsLeavesTheLogWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{MaxBytes: maxParts})
	if err != nil {
		t.Fatal(err)
	}
	appendRecord(t, l, Record{Type: Issue})
	if err := os.Mkdir(path+nextSuffix, 0o700); err != nil {
		t.Fatal(err)
	}
	appendRecord(t, l, Record{Type: Issue})
	appendRecord(t, l, Record{Type: Issue})
	if segments, err := rotated(path); err != nil || len(segments) != 0 {
		t.Fatalf("%v, %v; want no old file", segments, err)
	}
	closeLog(t, l)
	wantVerified(t, path, 3)
}

// TestSecondWriterIsRefusedAcrossRotation: the lock goes with the name.
func TestSecondWriterIsRefusedAcrossRotation(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{MaxBytes: maxParts})
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	appendRecord(t, l, Record{Type: Issue})
	early, err := os.OpenFile(path, os.O_RDWR, 0) // between opening and locking
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	appendRecord(t, l, Record{Type: Issue})
	if err := lockFile(early, path); err == nil {
		t.Error("a file that was rotated away is taken for the log")
	}
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second Open = %v", err)
	}
}

// TestNothingIsDroppedBeforeACheckpointCountsIt, as while the disk is low.
func TestNothingIsDroppedBeforeACheckpointCountsIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{MaxBytes: maxParts})
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	for range 3 {
		appendRecord(t, l, Record{Type: Issue})
	}
	if err := l.retain(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if first, err := Begin(path); err != nil || first != 1 {
		t.Errorf("the log begins with record %d, %v", first, err)
	}
	// A checkpoint counts the records, and none will count the one that says so.
	if err := l.Publish(testKey(t)); err != nil {
		t.Fatal(err)
	}
	if err := l.save(); err != nil {
		t.Fatal(err)
	}
	l.low.Store(true)
	if err := l.retain(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if first, err := Begin(path); err != nil || first != 1 {
		t.Errorf("while the disk is low: the log begins with record %d, %v", first, err)
	}
	l.low.Store(false)
	if err := l.retain(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if first, err := Begin(path); err != nil || first == 1 {
		t.Errorf("later: the log begins with record %d, %v", first, err)
	}
}

// Files that a reader has listed are dropped under it, or one is lost.
func TestFilesThatGoUnderAReader(t *testing.T) {
	for name, tt := range map[string]struct {
		gone []int
		want string
	}{
		"the oldest, by retention": {[]int{0, 1, 2}, ErrDropped.Error()},
		"one of them":              {[]int{2}, "record 3 is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "audit.jsonl")
			l := openSigned(t, path, testKey(t), Options{MaxAge: 24 * time.Hour})
			for range 4 {
				l.writer.since = time.Now().Add(-4 * time.Hour)
				appendRecord(t, l, Record{Type: Issue})
			}
			segments, err := rotated(path)
			if err != nil || len(segments) != 3 {
				t.Fatalf("%d old files, %v; want three", len(segments), err)
			}
			var read []uint64
			for line, lineErr := range Lines(path, 1) {
				if err = lineErr; err != nil {
					break
				}
				if read = append(read, line.Seq); line.Seq != 2 {
					continue
				}
				for _, i := range tt.gone {
					if err := os.Remove(segments[i].path); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || len(read) != 2 {
				t.Errorf("read %d, then %v; want two records and %q", read, err, tt.want)
			}
		})
	}
}

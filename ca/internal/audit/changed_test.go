// Logs that somebody changed, cut or put back: none is opened, and Verify says
// where.

package audit

import (
	"bytes"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"merlon.dev/sdk/checkpoint"
)

// TestSignedLogIsRefusedWhenItWasChanged is attack T53 with a checkpoint.
func TestSignedLogIsRefusedWhenItWasChanged(t *testing.T) {
	const n = 600
	key := testKey(t)
	good := signed(t, key, n)
	for name, test := range map[string]struct {
		change func(t *testing.T, path string)
		verify string
		open   string // "": too far from the end to be seen
	}{
		"byte of a record": {
			edit(func(l []string) []string {
				l[299] = strings.Replace(l[299], `"serial"`, `"Serial"`, 1)
				return l
			}), "line 300 (seq 300): its hash does not match", "",
		},
		"record changed with its hash": {
			edit(func(l []string) []string {
				l[299] = rehash(strings.Replace(l[299], `"serial":"12c"`, `"serial":"12d"`, 1))
				return l
			}), "line 300 (seq 300): it is not the record that the checkpoint counts", "",
		},
		"last record changed with its hash": {
			edit(func(l []string) []string {
				l[n-1] = rehash(strings.Replace(l[n-1], `"serial":"258"`, `"serial":"259"`, 1))
				return l
			}), "it is not the record that the checkpoint counts", "record 600 is not the one that its checkpoint counts",
		},
		"chain made anew from a record on": {
			edit(func(l []string) []string { return rechain(strings.Replace(l[299], "12c", "12d", 1), l, 299) }),
			"line 300 (seq 300): it is not the record", "record 600 is not the one",
		},
		"record dropped": {
			edit(func(l []string) []string { return slices.Delete(l, 299, 300) }),
			"line 300 (seq 301): it should have seq 300", "",
		},
		"tail cut off": {
			edit(func(l []string) []string { return l[:n-1] }),
			"ends with record 599, and its checkpoint counts 600", "ends with record 599, and its checkpoint counts 600",
		},
		"tail cut off in a line": {
			edit(func(l []string) []string { l[n-1] = l[n-1][:40]; return l }),
			"cut short", "ends with record 599, and its checkpoint counts 600",
		},
		"all cut off": {
			edit(func([]string) []string { return nil }),
			"ends with record 0, and its checkpoint counts 600", "ends with record 0, and its checkpoint counts 600",
		},
		"beginning dropped": {
			edit(func(l []string) []string { return l[300:] }),
			"begins with record 301, and no record under its checkpoint says", "begins with record 301, and no record that its checkpoint counts says",
		},
		"beginning dropped, and a record that nobody signed says so": {
			edit(func(l []string) []string {
				return append(l[300:], forge(l[n-1], `{"type":"admin","dropped_through":300}`))
			}),
			"begins with record 301, and no record under its checkpoint says", "begins with record 301, and no record that its checkpoint counts says",
		},
		"checkpoint taken away, and the tail cut off": {
			func(t *testing.T, path string) {
				t.Helper()
				edit(func(l []string) []string {
					return append(l[:300], forge(l[299], `{"type":"admin","checkpoint_size":300}`))
				})(t, path)
				remove("audit.tree/checkpoint")(t, path)
			},
			"a checkpoint of 300 records was saved before it, and the one that is there counts 0", "a checkpoint of 300 records was saved",
		},
		"byte of a full tile": {
			flip("audit.tree/tile/0/001"), "the tree that the checkpoint signs is damaged", "",
		},
		"byte of the last tile": {
			flip("audit.tree/tile/0/002.p/88"), "the tree that the checkpoint signs is damaged", "is not that of its checkpoint",
		},
		"tile missing": {
			remove("audit.tree/tile/0/001"), "no such file", "",
		},
		"root of the checkpoint": {
			flip("audit.tree/checkpoint"), "checkpoint", "checkpoint",
		},
		"certificate missing": {
			remove("audit.tree/certificates.pem"), "certificate", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(filepath.Dir(good))); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "audit.jsonl")
			if r, err := Verify(path); err != nil || r.Last != n || r.Checkpoint.Size != n || r.Key.Origin() != key.Origin() {
				t.Fatalf("Verify before the change = %+v, %v", r, err)
			}
			test.change(t, path)
			if r, err := Verify(path); err == nil || !strings.Contains(err.Error(), test.verify) {
				t.Errorf("Verify = %+v, %v; want an error with %q", r, err, test.verify)
			}
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			l, err := Open(path, Options{})
			if err == nil {
				defer closeLog(t, l)
			}
			if (err == nil) != (test.open == "") || err != nil && !strings.Contains(err.Error(), test.open) {
				t.Errorf("Open = %v; want %q", err, test.open)
			}
			if after, readErr := os.ReadFile(path); err != nil && (readErr != nil || !bytes.Equal(after, before)) {
				t.Error("a log that was refused was changed")
			}
		})
	}
}

func edit(change func([]string) []string) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(strings.Join(change(readLines(t, path)), "")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// flip changes a byte in the middle of a file beside the log.
func flip(name string) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		t.Helper()
		file := filepath.Join(filepath.Dir(path), name)
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		content[len(content)/3] ^= 1
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func remove(name string) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		t.Helper()
		if err := os.Remove(filepath.Join(filepath.Dir(path), name)); err != nil {
			t.Fatal(err)
		}
	}
}

// rechain makes the chain anew from line i on, as one does who can write the
// file and does not have the key of the checkpoints.
func rechain(changed string, lines []string, i int) []string {
	var buf bytes.Buffer
	_, end, _ := parseLine([]byte(strings.TrimSuffix(lines[i-1], "\n")))
	for _, line := range append([]string{changed}, lines[i+1:]...) {
		begin := strings.Index(line, `","time"`) + 2
		end = end.append(&buf, []byte("{"+line[begin:len(line)-1-tailLength]+"}"))
	}
	return append(lines[:i:i], strings.SplitAfter(buf.String(), "\n")...)
}

// forge makes a record that follows a line.
func forge(after, body string) string {
	var buf bytes.Buffer
	_, end, _ := parseLine([]byte(strings.TrimSuffix(after, "\n")))
	end.append(&buf, []byte(body))
	return buf.String()
}

// TestLogSaysThatItHasACheckpoint: one that was robbed of it, or got an older
// one, is not taken for a new one, however much is cut off its end; and what
// nobody has signed for is named before it is signed.
func TestLogSaysThatItHasACheckpoint(t *testing.T) {
	key := testKey(t)
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	first := openSigned(t, path, key, Options{})
	appendRecord(t, first, Record{Type: Issue})
	if err := first.Vouch(t.Context()); err != nil {
		t.Fatal(err)
	}
	older := t.TempDir()
	if err := os.CopyFS(older, os.DirFS(treeDir(path))); err != nil {
		t.Fatal(err)
	}
	closeLog(t, first)
	edit(func(l []string) []string { return append(l, forge(l[1], `{"type":"issue","serial":"f"}`)) })(t, path)

	var said bytes.Buffer
	second := openSigned(t, path, key, Options{Logger: slog.New(slog.NewTextHandler(&said, nil))})
	if err := second.Vouch(t.Context()); err != nil {
		t.Fatal(err)
	}
	closeLog(t, second)
	lines := readLines(t, path)
	if r, err := Verify(path); err != nil || r.Checkpoint.Size != 5 || len(lines) != 5 {
		t.Fatalf("Verify = %+v, %v, %d lines; want 5, all under the checkpoint", r, err, len(lines))
	}
	if !strings.Contains(lines[1], `"checkpoint_size":1`) || !strings.Contains(lines[3], "take over 1 audit records beyond the last checkpoint") ||
		!strings.Contains(lines[4], `"checkpoint_size":4`) || !strings.Contains(said.String(), "level=WARN") || !strings.Contains(said.String(), "records=1") {
		t.Fatalf("%s\nlogged: %s", strings.Join(lines, ""), said.String())
	}

	edit(func(l []string) []string { return l[:2] })(t, path) // no more than that there was one
	wantRobbed := func(want string) {
		t.Helper()
		if _, err := Verify(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Verify = %v; want %q", err, want)
		}
		if l, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), want) {
			if err == nil {
				closeLog(t, l)
			}
			t.Errorf("Open = %v; want %q", err, want)
		}
	}
	if err := os.RemoveAll(treeDir(path)); err != nil {
		t.Fatal(err)
	}
	wantRobbed("a checkpoint of 1 records was saved before it, and the one that is there counts 0")
	edit(func([]string) []string { return lines })(t, path)
	if err := os.CopyFS(treeDir(path), os.DirFS(older)); err != nil {
		t.Fatal(err)
	}
	wantRobbed("a checkpoint of 4 records was saved before it, and the one that is there counts 1")
}

// A file's own word for what was before it counts only where nothing is before it,
// and the tree has the record.
func TestFirstRecordFollowsWhatIsThere(t *testing.T) {
	one, other := link{seq: 4, hash: [32]byte{1}}, link{seq: 4, hash: [32]byte{2}}
	after := func(l link) header { return header{Seq: l.seq + 1, Prev: hex.EncodeToString(l.hash[:])} }
	for name, test := range map[string]struct {
		first   header
		prior   link
		counted int64
		want    *link // nil: it is refused
	}{
		"the file before":               {after(one), one, 0, &one},
		"another file before":           {after(one), other, 9, nil},
		"a gap after the file before":   {after(one), link{seq: 3}, 9, nil},
		"dropped, and in the tree":      {after(one), link{}, 5, &one},
		"dropped, and not in the tree":  {after(one), link{}, 4, nil},
		"dropped, and there is no tree": {after(one), link{}, 0, nil},
		"the first of all":              {after(link{}), link{}, 0, &link{}},
		"one before the first of all":   {after(link{hash: one.hash}), link{}, 9, nil},
	} {
		before, err := test.first.before(test.prior, checkpoint.Checkpoint{Size: test.counted})
		if (err == nil) != (test.want != nil) || err == nil && before != *test.want {
			t.Errorf("%s: %+v, %v", name, before, err)
		}
	}
}

func TestLogOfAnotherKeyIsRefused(t *testing.T) {
	path := signed(t, testKey(t), 3)
	l := openLog(t, path)
	if err := l.Publish(testKey(t)); err == nil || !strings.Contains(err.Error(), "another one than that of this CA's log key") {
		t.Fatalf("Publish with another key = %v", err)
	}
	if _, err := l.Checkpoint(); !errors.Is(err, ErrNoKey) {
		t.Fatalf("Checkpoint without a key = %v", err)
	}
}

// TestLogGrowsOnWithoutItsKey: a restore appends without the CA's keys.
func TestLogGrowsOnWithoutItsKey(t *testing.T) {
	key := testKey(t)
	path := signed(t, key, 300)
	l := openLog(t, path)
	appendRecord(t, l, Record{Type: Admin})
	closeLog(t, l)
	if r, err := Verify(path); err != nil || r.Last != 301 || r.Checkpoint.Size != 300 {
		t.Fatalf("Verify = %+v, %v", r, err)
	}
	l = openSigned(t, path, key, Options{})
	if c, err := l.Checkpoint(); err != nil || c.Size != 301 {
		t.Fatalf("Checkpoint = %+v, %v", c, err)
	}
}

// The tree beside the chain: it is the tree of the lines whatever happens
// between, and with a checkpoint what is missing at the end is missed, too.

package audit

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/checkpoint"
)

// testAuthority has a root of shop.test and an intermediate.
func testAuthority(t testing.TB) *authority.X509Authority {
	t.Helper()
	var above *x509.Certificate
	var aboveKey *ecdsa.PrivateKey
	certs := make([]*x509.Certificate, 2)
	for i := range certs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: fmt.Sprint("authority ", i)},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "shop.test"}},
		}
		if above == nil {
			above, aboveKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, above, key.Public(), aboveKey)
		if err != nil {
			t.Fatal(err)
		}
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		above, aboveKey = certs[i], key
	}
	return &authority.X509Authority{Chain: certs[1:], Root: certs[0], Signer: aboveKey}
}

// testKey is a log's key that a test authority vouches for.
func testKey(t testing.TB) Key {
	t.Helper()
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	ca := testAuthority(t)
	chain, err := ca.CertifyLogKey("ca-1", public, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	chain = append(chain, ca.Root.Raw)
	return Key{
		Key:    checkpoint.Key{TrustDomain: "shop.test", Replica: "ca-1", Public: public},
		Signer: private, Chain: func() ([][]byte, error) { return chain, nil },
	}
}

// openSigned opens a log that signs checkpoints.
func openSigned(t testing.TB, path string, key Key, opts Options) *Log {
	t.Helper()
	l, err := Open(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeLog(t, l) })
	if err := l.Publish(key); err != nil {
		t.Fatal(err)
	}
	return l
}

// signed makes a log of n records with a checkpoint, and closes it.
func signed(t testing.TB, key Key, n int) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "audit.jsonl")
	l := openSigned(t, path, key, Options{})
	var records []Record
	for i := range n {
		records = append(records, Record{Type: Issue, Serial: fmt.Sprintf("%x", i+1)})
	}
	if err := l.Append(t.Context(), records...); err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
	return path
}

// modelTree is computed naively from the lines that were acknowledged.
type modelTree struct {
	lines  []string
	hashes []tlog.Hash
}

func (m *modelTree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	var out []tlog.Hash
	for _, i := range indexes {
		out = append(out, m.hashes[i])
	}
	return out, nil
}

// take adds the lines of the log that the model does not have, and reports
// those that it has and the log has not.
func (m *modelTree) take(t *rapid.T, path string) {
	n := 0
	for line, err := range Lines(path, 1) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n <= len(m.lines) {
			if m.lines[n-1] != string(line.Text) {
				t.Fatalf("record %d became %s", n, line.Text)
			}
			continue
		}
		hashes, err := tlog.StoredHashes(int64(n-1), line.Text, m)
		if err != nil {
			t.Fatal(err)
		}
		m.lines, m.hashes = append(m.lines, string(line.Text)), append(m.hashes, hashes...)
	}
	if n < len(m.lines) {
		t.Fatalf("%d of %d acknowledged records are left", n, len(m.lines))
	}
}

// TestTreeIsThatOfTheLines: whatever is appended, saved, rotated, and however
// often the process dies and a torn line is left, what was acknowledged is
// there, the checkpoint is that of the lines, and it goes on from all before.
func TestTreeIsThatOfTheLines(tt *testing.T) {
	key := testKey(tt)
	rapid.Check(tt, func(t *rapid.T) {
		dir := tt.TempDir()
		opts := Options{MaxBytes: rapid.SampledFrom([]int64{0, 80 << 10}).Draw(t, "max bytes")}
		m := &modelTree{}
		before := checkpoint.Checkpoint{Origin: key.Origin()}
		for range rapid.IntRange(1, 3).Draw(t, "lives") {
			path := filepath.Join(dir, "audit.jsonl")
			l, err := Open(path, opts)
			if err == nil {
				err = l.Publish(key)
			}
			if err != nil {
				t.Fatal(err)
			}
			for range rapid.IntRange(0, 2).Draw(t, "steps") {
				records := slices.Repeat([]Record{{Type: Issue, Serial: "a"}}, rapid.SampledFrom([]int{1, 3, 100, 300}).Draw(t, "records"))
				if err := l.Append(context.Background(), records...); err != nil {
					t.Fatal(err)
				}
				m.take(t, path)
				before = checkCheckpoint(t, l, key, m, before)
				if rapid.Bool().Draw(t, "save") {
					if err := l.save(); err != nil {
						t.Fatal(err)
					}
				}
			}
			// What a killed process leaves is what is on disk now.
			next := tt.TempDir()
			if err := errors.Join(os.CopyFS(next, os.DirFS(dir)), l.Close()); err != nil {
				t.Fatal(err)
			}
			dir = next
			appendRaw(tt, filepath.Join(dir, "audit.jsonl"), rapid.SampledFrom([]string{"", `{"seq":`, "\x00\x00"}).Draw(t, "torn"))
		}
	})
}

// checkCheckpoint compares what the log signs with the model, and has tlog
// check its proofs.
func checkCheckpoint(t *rapid.T, l *Log, key Key, m *modelTree, before checkpoint.Checkpoint) checkpoint.Checkpoint {
	s, err := l.Checkpoint()
	if err != nil {
		t.Fatal(err)
	}
	c, err := key.Open(s.Note)
	want, rootErr := tlog.TreeHash(int64(len(m.lines)), m)
	if err := errors.Join(err, rootErr); err != nil || c != s.Checkpoint || c.Size != int64(len(m.lines)) || c.Root != want {
		t.Fatalf("checkpoint = %+v, %v; want %d leaves with root %v", c, err, len(m.lines), want)
	}
	growth, err := l.tree.ProveGrowth(c.Size, before.Size)
	if err == nil {
		err = c.Follows(before, growth)
	}
	if err != nil {
		t.Fatal(err)
	}
	index := rapid.Int64Range(0, c.Size-1).Draw(t, "index")
	proof, err := l.tree.ProveLeaf(c.Size, index)
	if err == nil {
		err = c.Holds([]byte(m.lines[index]), index, proof)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

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

// TestAsyncDoesNotWaitForTheDisk, and what is on its way when the log is closed
// is there; refusals wait all the same.
func TestAsyncDoesNotWaitForTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{Async: true})
	if err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	l.sync = func(f *os.File) error { <-hold; return f.Sync() }
	for range 100 {
		if err := l.Issue(t.Context(), Record{Type: Issue}); err != nil {
			t.Fatal(err)
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := l.Issue(short, Record{Type: Refuse}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a refusal did not wait: %v", err)
	}
	close(hold)
	closeLog(t, l)
	wantVerified(t, path, 101)
}

// TestStrictWaitsForTheDisk: an SVID leaves when its record is synced.
func TestStrictWaitsForTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := openLog(t, path)
	hold := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l.sync = func(f *os.File) error { cancel(); <-hold; return f.Sync() }
	if err := l.Issue(ctx, Record{Type: Issue}); !errors.Is(err, context.Canceled) {
		t.Errorf("an SVID did not wait: %v", err)
	}
	close(hold)
	if err := l.Issue(t.Context(), Record{Type: Issue}); err != nil {
		t.Error(err)
	}
	closeLog(t, l)
	wantVerified(t, path, 2)
}

func TestAsyncLogThatFailedTakesNothing(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.jsonl"))
	l.opts.Async = true
	eio := errors.New("input/output error")
	l.sync = func(*os.File) error { return eio }
	if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, eio) {
		t.Fatal(err)
	}
	if err := l.Issue(t.Context(), Record{Type: Issue}); !errors.Is(err, eio) {
		t.Fatalf("Issue after a failed sync = %v", err)
	}
}

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

func TestLinesAreFoundByTheirNumber(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{MaxBytes: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	const n = 3000
	for i := range n / 100 {
		var records []Record
		for j := range 100 {
			records = append(records, Record{Type: Issue, Detail: strings.Repeat("x", (i*j)%4000)})
		}
		if err := l.Append(t.Context(), records...); err != nil {
			t.Fatal(err)
		}
	}
	for first := uint64(1); first <= n; first += 97 {
		want := first
		for line, err := range Lines(path, first) {
			if err != nil || line.Seq != want {
				t.Fatalf("Lines(%d) yields record %d, %v; want %d", first, line.Seq, err, want)
			}
			if want++; want > first+5 {
				break
			}
		}
	}
	for line, err := range Lines(path, n+1) {
		t.Fatalf("record %d, %v after the last", line.Seq, err)
	}
}

// FuzzSeek: a file that is no log, or is damaged, is an error or an offset
// within it, and never more.
func FuzzSeek(f *testing.F) {
	f.Add([]byte(`{"seq":1,"prev"`+"\n"), uint64(1))
	f.Add(bytes.Repeat([]byte(`{"seq":12,"prev":"0"}`+"\n"), 5000), uint64(12))
	f.Fuzz(func(t *testing.T, content []byte, seq uint64) {
		off, err := seekIn(bytes.NewReader(content), int64(len(content)), seq)
		if err == nil && (off < 0 || off > int64(len(content)) || off > 0 && content[off-1] != '\n') {
			t.Fatalf("seek = %d of %d", off, len(content))
		}
		if h, err := firstOf(bytes.NewReader(content)); err == nil && h != nil && h.Seq == 0 {
			t.Fatal("a first record without a number")
		}
	})
}

// BenchmarkLeaf is what the tree adds to a record, in CPU and without the sync
// that it shares.
func BenchmarkLeaf(b *testing.B) {
	l, err := Open(filepath.Join(b.TempDir(), "audit.jsonl"), Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer closeLog(b, l)
	l.sync = func(*os.File) error { return nil }
	const group = 100
	records := slices.Repeat([]Record{{
		Time: time.Now(), Type: Issue, Actor: "spiffe://shop.test/agent/n1", SPIFFEID: "spiffe://shop.test/web",
		EntryID: "0195b7a2-5c1e-7c55-8d0e-111111111111", Serial: strings.Repeat("a", 40), AuthorityID: strings.Repeat("b", 40),
		SignedHash: strings.Repeat("c", 64), NotAfter: time.Now().Add(time.Hour),
	}}, group)
	for name, append := range map[string]func() error{
		"record-with-leaf": func() error { return l.Append(context.Background(), records...) },
		"leaf-alone": func() error {
			for range group {
				l.grow(benchLine)
			}
			return nil
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			before := cpuTime(b)
			for b.Loop() {
				if err := append(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N*group), "cpu-ns/leaf")
		})
	}
}

var benchLine = append(bytes.Repeat([]byte("x"), 700), '\n')

func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestRecordOnItsWayIsNotProven: it is in the file, and its SVID has not left.
func TestRecordOnItsWayIsNotProven(t *testing.T) {
	l := openSigned(t, filepath.Join(t.TempDir(), "audit.jsonl"), testKey(t), Options{})
	issued := Record{Type: Issue, Serial: "a1", SignedHash: "00"}
	appendRecord(t, l, issued)
	hold, syncing := make(chan struct{}), make(chan struct{})
	l.sync = func(f *os.File) error {
		close(syncing)
		<-hold
		return f.Sync()
	}
	done := make(chan error, 1)
	go func() { done <- l.Append(context.Background(), Record{Type: Issue, Serial: "a2", SignedHash: "00"}) }()
	<-syncing
	proofs, under, _, err := l.Prove(t.Context(), "a1", "a2")
	if err != nil || len(proofs) != 1 || proofs[0].Serial != "a1" || under.Size != 1 {
		t.Errorf("Prove = %v under %d, %v; want a1 alone", proofs, under.Size, err)
	}
	close(hold)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if proofs, _, _, err := l.Prove(t.Context(), "a1", "a2"); err != nil || len(proofs) != 2 {
		t.Errorf("Prove after the sync = %v, %v", proofs, err)
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

// BenchmarkProve looks for one SVID among 50 000 records.
func BenchmarkProve(b *testing.B) {
	path := filepath.Join(b.TempDir(), "audit.jsonl")
	l := openSigned(b, path, testKey(b), Options{})
	records := slices.Repeat([]Record{{
		Time: time.Now(), Type: Issue, Actor: "spiffe://shop.test/agent/n1", SPIFFEID: "spiffe://shop.test/web",
		EntryID: "0195b7a2-5c1e-7c55-8d0e-111111111111", Serial: strings.Repeat("a", 40), AuthorityID: strings.Repeat("b", 40),
		SignedHash: strings.Repeat("c", 64), NotAfter: time.Now().Add(time.Hour),
	}}, 500)
	for range 100 {
		if err := l.Append(b.Context(), records...); err != nil {
			b.Fatal(err)
		}
	}
	appendRecord(b, l, Record{Type: Issue, Serial: "1234", SignedHash: "00"})
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(info.Size())
	for b.Loop() {
		if proofs, _, _, err := l.Prove(b.Context(), "1234"); err != nil || len(proofs) != 1 {
			b.Fatal(len(proofs), err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/50_001, "ns/record")
}

// The chain on disk: what survives a torn line, what a changed byte is
// noticed by, and that nothing is acknowledged after a failed sync.

package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func openLog(t testing.TB, path string) *Log {
	t.Helper()
	l, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeLog(t, l) })
	return l
}

func closeLog(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func appendRecord(t testing.TB, l *Log, r Record) {
	t.Helper()
	if err := l.Append(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// written makes a log of n records and closes it.
func written(t testing.TB, n int) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	for i := range n {
		appendRecord(t, l, Record{Type: Issue, Serial: fmt.Sprintf("%x", i+1)})
	}
	closeLog(t, l)
	return path
}

func readLines(t testing.TB, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(b), "\n")
	return lines[:len(lines)-1] // nothing follows the last newline
}

func wantVerified(t testing.TB, path string, n int) {
	t.Helper()
	if got, err := Verify(path); err != nil || got.Last != uint64(n) {
		t.Fatalf("Verify = %+v, %v; want %d records", got, err, n)
	}
}

func TestRecordsComeBackAsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	at := time.Date(2026, 11, 22, 21, 0, 0, 5, time.FixedZone("X", 3600))
	want := Record{
		Time: at, Type: Issue, Actor: "spiffe://shop.test/agent/n1", SPIFFEID: "spiffe://shop.test/web",
		EntryID: "e1", Serial: "0a", AuthorityID: "ff", NotAfter: at.Add(time.Hour), Detail: "d", Reason: "r",
	}
	appendRecord(t, l, want)
	appendRecord(t, l, Record{Type: Refuse})
	var got struct {
		Seq  uint64
		Prev string
		Record
	}
	lines := readLines(t, path) // acknowledged means written
	if err := json.Unmarshal([]byte(lines[0]), &got); err != nil {
		t.Fatal(err)
	}
	if got.Seq != 1 || got.Prev != strings.Repeat("0", 64) || !cmp.Equal(got.Record, want) {
		t.Fatalf("first record = %+v; want %+v", got, want)
	}
	if err := json.Unmarshal([]byte(lines[1]), &got); err != nil || got.Seq != 2 || time.Since(got.Time) > time.Hour {
		t.Fatalf("second record = %+v, %v", got, err)
	}
	if strings.Contains(lines[1], "not_after") || strings.Contains(lines[1], "actor") {
		t.Errorf("absent fields are written: %s", lines[1])
	}
	wantVerified(t, path, 2)
}

func TestChainGoesOnAfterReopening(t *testing.T) {
	path := written(t, 3)
	l := openLog(t, path)
	appendRecord(t, l, Record{Type: Admin})
	closeLog(t, l)
	l = openLog(t, path)
	appendRecord(t, l, Record{Type: Admin})
	wantVerified(t, path, 5)
}

// Every act without an outcome is named, in the log's order; its parts are none.
func TestVerifyNamesActsWithoutAnOutcome(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	for _, r := range []Record{
		{Act: "a", Detail: "begin to a", Pending: true},
		{Act: "b", Detail: "begin to b", Pending: true, Actor: "uid:0"},
		{Act: "c", Detail: "begin to c", Pending: true},
		{Act: "b", Detail: "a part of b", Pending: true},
		{Act: "a", Detail: "a"},
		{Detail: "an act of the CA's own"},
		{Act: "d", Detail: "begin to d", Pending: true},
		{Act: "c", Type: Refuse},
	} {
		if r.Type == "" {
			r.Type = Admin
		}
		appendRecord(t, l, r)
	}
	closeLog(t, l)
	r, err := Verify(path)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, u := range r.Unfinished {
		got = append(got, fmt.Sprint(u.Seq, " ", u.Act, " ", u.Detail, " ", u.Actor))
	}
	if want := []string{"2 b begin to b uid:0", "7 d begin to d "}; !slices.Equal(got, want) {
		t.Errorf("unfinished: %q; want %q", got, want)
	}
}

func TestRecordsOfOneAppendStayTogether(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			var records []Record
			for i := range 100 {
				records = append(records, Record{Type: Issue, Actor: fmt.Sprint(w), Serial: fmt.Sprint(i)})
			}
			if err := l.Append(t.Context(), records...); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	wantVerified(t, path, 800)
	lines := readLines(t, path)
	for i, line := range lines {
		var got, first Record
		if err := errors.Join(json.Unmarshal([]byte(line), &got), json.Unmarshal([]byte(lines[i/100*100]), &first)); err != nil {
			t.Fatal(err)
		}
		if got.Actor != first.Actor || got.Serial != fmt.Sprint(i%100) {
			t.Fatalf("line %d is %s of %s; want %d of %s", i, got.Serial, got.Actor, i%100, first.Actor)
		}
	}
	if err := l.Append(t.Context(), Record{Type: Issue}, Record{}); err == nil {
		t.Fatal("record without a type was taken")
	}
	wantVerified(t, path, 800)
}

func TestConcurrentAppendsShareSyncs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	var syncs atomic.Int32
	fsync := l.sync
	l.sync = func(f *os.File) error { syncs.Add(1); return fsync(f) }
	const writers, each = 64, 20
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				if err := l.Append(t.Context(), Record{Type: Issue, Serial: fmt.Sprintf("%d-%d", w, i)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	wantVerified(t, path, writers*each)
	if n := syncs.Load(); n > writers*each/4 {
		t.Errorf("%d syncs for %d appends", n, writers*each)
	}
}

func TestFileIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(path, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, path + "2"} {
		openLog(t, path)
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode of %s = %v, %v; want 0600", path, info.Mode(), err)
		}
	}
}

func TestSecondWriterIsRefused(t *testing.T) {
	path := written(t, 1)
	openLog(t, path)
	if _, err := Open(path, Options{}); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Fatalf("second Open = %v", err)
	}
}

func TestTornLastLineIsCutWithAWarning(t *testing.T) {
	for name, torn := range map[string]string{
		"half a line":       `{"seq":4,"prev":"00`,
		"line without end":  "", // filled in below
		"zeros":             strings.Repeat("\x00", 5000),
		"more than a group": strings.Repeat("\x00", maxGroupBytes+maxLine),
	} {
		t.Run(name, func(t *testing.T) {
			path := written(t, 3)
			if torn == "" {
				torn = strings.TrimSuffix(readLines(t, path)[2], "\n")
			}
			appendRaw(t, path, torn)
			if _, err := Verify(path); err == nil {
				t.Error("Verify took a torn line")
			}
			var warned bytes.Buffer
			l, err := Open(path, Options{Logger: slog.New(slog.NewTextHandler(&warned, nil))})
			if err != nil {
				t.Fatal(err)
			}
			defer closeLog(t, l)
			if !strings.Contains(warned.String(), "level=WARN") || !strings.Contains(warned.String(), fmt.Sprintf("bytes=%d", len(torn))) {
				t.Errorf("warning = %q", warned.String())
			}
			appendRecord(t, l, Record{Type: Issue})
			wantVerified(t, path, 4)
		})
	}
}

// A loss of power takes any pages of a group that was not synced: also the first, or one
// in the midst. Zeroes that are no page's are damage.
func TestGroupThatLostPagesIsCut(t *testing.T) {
	for name, c := range map[string]struct {
		begin string // of the group, before the page that is lost
		short int    // so many bytes of the page are there
		end   string // after the page; LINE is a whole record
		want  string // the refusal; empty: it is cut off
	}{
		"the first page":             {"", 0, `4"}` + "\n", ""},
		"one in the midst":           {`{"seq":4,"prev":"00`, 0, `4"}` + "\n", ""},
		"a whole record comes after": {`{"seq":4,`, 0, `4"}` + "\nLINE", ""},
		"zeroes within a page":       {`{"seq":4,`, 7, `4"}` + "\n", "its hash does not match what it says"},
	} {
		t.Run(name, func(t *testing.T) {
			path := written(t, 3)
			lines := readLines(t, path)
			at := len(strings.Join(lines, "")) + len(c.begin)
			zeroes := 2*pageBytes - at%pageBytes - c.short
			appendRaw(t, path, c.begin+strings.Repeat("\x00", zeroes)+strings.Replace(c.end, "LINE", lines[2], 1))
			l, err := Open(path, Options{})
			if c.want != "" {
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("Open = %v; want %q", err, c.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer closeLog(t, l)
			appendRecord(t, l, Record{Type: Issue})
			wantVerified(t, path, 4)
		})
	}
}

func TestTornFirstLineIsCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	appendRaw(t, path, `{"seq":1,`)
	appendRecord(t, openLog(t, path), Record{Type: Issue})
	wantVerified(t, path, 1)
}

func appendRaw(t testing.TB, path, s string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(s)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestTamperingIsFound is attack T53, in a log of which no checkpoint is saved.
func TestTamperingIsFound(t *testing.T) {
	for name, test := range map[string]struct {
		change func(lines []string) []string
		want   BadRecordError
	}{
		"byte of a record": {
			func(l []string) []string { l[2] = strings.Replace(l[2], `"serial":"3"`, `"serial":"4"`, 1); return l },
			BadRecordError{Line: 3, Seq: 3, Reason: "its hash does not match what it says"},
		},
		"byte of the last record": {
			func(l []string) []string { l[9] = strings.Replace(l[9], `"serial":"a"`, `"serial":"b"`, 1); return l },
			BadRecordError{Line: 10, Seq: 10, Reason: "its hash does not match what it says"},
		},
		"record changed with its hash": {
			func(l []string) []string {
				l[2] = rehash(strings.Replace(l[2], `"serial":"3"`, `"serial":"4"`, 1))
				return l
			},
			BadRecordError{Line: 4, Seq: 4, Reason: "its prev is not the hash of the line before"},
		},
		"record before the last changed with its hash": {
			func(l []string) []string {
				l[8] = rehash(strings.Replace(l[8], `"serial":"9"`, `"serial":"4"`, 1))
				return l
			},
			BadRecordError{Line: 10, Seq: 10, Reason: "its prev is not the hash of the line before"},
		},
		"record dropped": {
			func(l []string) []string { return append(l[:4], l[5:]...) },
			BadRecordError{Line: 5, Seq: 6, Reason: "it should have seq 5: records are missing, doubled or out of order"},
		},
		"first record dropped": {
			func(l []string) []string { return l[1:] },
			BadRecordError{Line: 1, Seq: 2, Reason: "it should have seq 1: records are missing, doubled or out of order"},
		},
		"all but one dropped": {
			func(l []string) []string { return l[9:] },
			BadRecordError{Line: 1, Seq: 10, Reason: "it should have seq 1: records are missing, doubled or out of order"},
		},
		"record doubled": {
			func(l []string) []string { return append(l[:5], l[4:]...) },
			BadRecordError{Line: 6, Seq: 5, Reason: "it should have seq 6: records are missing, doubled or out of order"},
		},
		"empty line": {
			func(l []string) []string { l[5] = "\n" + l[5]; return l },
			BadRecordError{Line: 6, Reason: "not a record"},
		},
		"foreign line at the end": {
			func(l []string) []string { return append(l, "Nov 22 logrotate: hello\n") },
			BadRecordError{Line: 11, Reason: "not a record"},
		},
		"foreign object with a hash of its own": {
			func(l []string) []string { return append(l, rehash(`{"seq":11`+strings.Repeat(" ", tailLength)+"\n")) },
			BadRecordError{Line: 11, Seq: 11, Reason: "not a record"},
		},
		"endless line": {
			func(l []string) []string { l[0] = strings.Repeat("x", 2*maxLine) + "\n"; return l },
			BadRecordError{Line: 1, Reason: "longer than any record"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := written(t, 10)
			lines := test.change(readLines(t, path))
			if err := os.WriteFile(path, []byte(strings.Join(lines, "")), 0o600); err != nil {
				t.Fatal(err)
			}
			report, err := Verify(path)
			bad, ok := errors.AsType[*BadRecordError](err)
			test.want.File = path
			if !ok || *bad != test.want || report.Last != uint64(test.want.Line-1) {
				t.Fatalf("Verify = %+v, %v; want %v", report, err, &test.want)
			}
			if l, err := Open(path, Options{}); err == nil {
				closeLog(t, l)
				t.Fatal("Open took it")
			}
		})
	}
}

// rehash gives a line the hash that fits it.
func rehash(line string) string {
	var buf bytes.Buffer
	body := line[:len(line)-tailLength-1]
	_, own, _ := parseLine([]byte(line[:len(line)-1]))
	fmt.Fprintf(&buf, `%s,"hash":"%x"}`+"\n", body, own.hash)
	return buf.String()
}

func TestFailedSyncStopsTheLogForGood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	appendRecord(t, l, Record{Type: Issue})
	eio := errors.New("input/output error")
	fsync := l.sync
	l.sync = func(*os.File) error { return eio }
	if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, eio) {
		t.Fatalf("Append with a failing sync = %v", err)
	}
	l.sync = fsync // the disk is said to be well again
	if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, eio) {
		t.Fatalf("Append after a failed sync = %v; want the same failure", err)
	}
}

func TestFailedWriteStopsTheLogForGood(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // its file is closed already
	if err := l.writer.file.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, os.ErrClosed) || errors.Is(err, ErrFull) {
			t.Fatalf("Append to a broken file = %v", err)
		}
	}
	if l.Fault() == nil {
		t.Error("a log that has stopped reports no fault")
	}
}

func TestClosedLogRefusesRecords(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.log"))
	closeLog(t, l)
	if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, ErrClosed) {
		t.Fatalf("Append = %v; want %v", err, ErrClosed)
	}
}

func TestAppendEndsWithItsContext(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.log"))
	hold := make(chan struct{})
	l.sync = func(*os.File) error { <-hold; return nil }
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() { result <- l.Append(ctx, Record{Type: Issue}) }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("Append = %v; want %v", err, context.Canceled)
	}
	close(hold)
}

func TestRecordNeedsAType(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.log"))
	if err := l.Append(t.Context(), Record{}); err == nil {
		t.Fatal("record without a type was taken")
	}
}

func TestOverlongFieldsAreCut(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	l := openLog(t, path)
	worst := strings.Repeat("\x01", 10*maxField)
	appendRecord(t, l, Record{
		Type: Type(worst), Actor: worst, SPIFFEID: worst, EntryID: worst, Serial: worst,
		AuthorityID: worst, Detail: worst, Reason: worst,
	})
	appendRecord(t, l, Record{Type: Refuse, SPIFFEID: "spiffe://" + strings.Repeat("a", 2039)})
	lines := readLines(t, path)
	if len(lines[0]) > maxLine || !strings.Contains(lines[0], cutMark) {
		t.Errorf("line of %d bytes; want at most %d, marked as cut", len(lines[0]), maxLine)
	}
	if strings.Contains(lines[1], cutMark) {
		t.Error("a SPIFFE ID of 2048 bytes was cut")
	}
	wantVerified(t, path, 2)
}

// TestOneRecordIsOneLineOfASCII is attack T36: whatever a field holds, it is
// one line that no terminal and no parser takes for more, and it comes back.
func TestOneRecordIsOneLineOfASCII(tt *testing.T) {
	path := filepath.Join(tt.TempDir(), "audit.log")
	l := openLog(tt, path)
	var n int
	check := func(t *rapid.T, text string) {
		if err := l.Append(context.Background(), Record{Type: Refuse, Actor: text, Detail: text}); err != nil {
			t.Fatal(err)
		}
		n++
		lines := readLines(tt, path)
		if len(lines) != n {
			t.Fatalf("%d lines after %d records", len(lines), n)
		}
		line := strings.TrimSuffix(lines[n-1], "\n")
		if i := strings.IndexFunc(line, func(r rune) bool { return r < ' ' || r > '~' }); i >= 0 {
			t.Fatalf("byte %#x in line %s", line[i], line)
		}
		var got Record
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatal(err)
		}
		if got.Type != Refuse || utf8.ValidString(text) && (got.Detail != text || got.Actor != text) {
			t.Fatalf("came back as %+v; want %q", got, text)
		}
	}
	rapid.Check(tt, func(t *rapid.T) {
		check(t, rapid.OneOf(
			rapid.String(),
			rapid.SampledFrom([]string{
				"\n{\"type\":\"audit\",\"seq\":1}", "a\r\nb", "\x1b[31mred", "\u009b31m", "\u2028\u2029", "\u202eevil",
				"\x00\x7f", "\xff\xfe", `","hash":"00"}`, "<script>", "\U0001f600",
			}),
		).Draw(t, "text"))
	})
	wantVerified(tt, path, n)
}

// FuzzVerify feeds files: nothing but an unbroken chain may pass, and where
// one ends, Open goes on.
func FuzzVerify(f *testing.F) {
	good, err := os.ReadFile(written(f, 3))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-10])
	f.Add([]byte("{}\n"))
	f.Add([]byte("\n\n"))
	f.Add([]byte(rehash(`{"seq":1,"type":"x"` + strings.Repeat(" ", tailLength) + "\n")))
	f.Fuzz(func(t *testing.T, file []byte) {
		n, end, err := walk(bytes.NewReader(file), link{}, func(header, []byte) error { return nil })
		whole := bytes.LastIndexByte(file, '\n') + 1
		last, lastErr := lastLink(file[:whole], link{})
		if err != nil {
			return
		}
		if n != bytes.Count(file, []byte("\n")) || whole != len(file) || end.seq != uint64(n) {
			t.Fatalf("walk took %d of %d lines, to seq %d", n, bytes.Count(file, []byte("\n")), end.seq)
		}
		if lastErr != nil || last != end {
			t.Fatalf("walk took what Open refuses, or goes on with elsewhere: %v", lastErr)
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 64, 512} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			l := openLog(b, filepath.Join(b.TempDir(), "audit.log"))
			r := Record{
				Time: time.Now(), Type: Issue, Actor: "spiffe://shop.test/agent/n1", SPIFFEID: "spiffe://shop.test/web",
				EntryID: "0195b7a2-5c1e-7c55-8d0e-111111111111", Serial: strings.Repeat("a", 40),
				NotAfter: time.Now().Add(time.Hour),
			}
			b.ReportAllocs()
			appendFrom(b, writers, func() error { return l.Append(context.Background(), r) })
		})
	}
}

// appendFrom spreads the iterations over writers.
func appendFrom(b *testing.B, writers int, do func() error) {
	work := make(chan struct{}, writers)
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range work {
				if err := do(); err != nil {
					b.Error(err)
				}
			}
		})
	}
	for b.Loop() {
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
}

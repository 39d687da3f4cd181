// Outputs that hang, fail, fill up or refuse: calls go on, the other outputs too,
// and what is lost is counted.

package decisionlog

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var discard = slog.New(slog.DiscardHandler)

// begin runs w; end ends it and waits.
func begin(w *Writer) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { w.Run(ctx); close(done) }()
	return func() { cancel(); <-done }
}

// pipe is what w writes to and nobody reads until release.
func pipe(t *testing.T) (w io.Writer, release func() []byte) {
	t.Helper()
	r, wr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); wr.Close() })
	return wr, func() []byte {
		wr.SetWriteDeadline(time.Now().Add(-time.Second)) // whoever hangs in it does no more
		r.SetReadDeadline(time.Now().Add(time.Second))
		all, _ := io.ReadAll(r)
		return all
	}
}

// A pipe that nobody reads takes 64 KiB and then blocks.
func TestHangingOutputHoldsNothingUp(t *testing.T) {
	r := NewRecorder(Options{Records: 1 << 10})
	path := filepath.Join(t.TempDir(), "decisions.jsonl")
	file, err := OpenFile(FileOptions{Path: path, MaxBytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	hung, release := pipe(t)
	w := NewWriter(r, Format{}, discard, Target{Name: "hung", Output: Stream{hung}}, Target{Name: "file", Output: file})
	end := begin(w)
	const n = 14_000 // of some 800 bytes, which is more than waits for one output
	for i := range n {
		in, d := deny(i)
		in.Path = fmt.Sprint("/", strings.Repeat("x", 300))
		for before := r.Dropped(); ; { // as fast as the writer, so that the ring drops nothing
			r.Record(in, d, instant)
			if after := r.Dropped(); after == before {
				break
			} else {
				before = after
			}
			time.Sleep(time.Millisecond)
		}
	}
	waitFor(t, "the file to have all", func() bool { return w.Stats("file").Written == n })
	if s := w.Stats("hung"); s.Dropped == 0 || s.Written+s.Dropped > n {
		t.Errorf("of %d lines for an output that hangs: %+v", n, s)
	}
	began := time.Now()
	end()
	if took := time.Since(began); took > 20*time.Second { // its bound is 2.5 s
		t.Errorf("the end took %v", took)
	}
	release()
	waitFor(t, "the lines left behind to be counted", func() bool { s := w.Stats("hung"); return s.Written+s.Dropped+s.Refused == n })
	lines := readLines(t, path)
	if len(lines) != n {
		t.Errorf("the file has %d lines; want %d", len(lines), n)
	}
	told := uint64(0)
	for _, line := range lines {
		var e struct{ Custom custom }
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatal(err)
		}
		told += e.Custom.Merlon.Dropped
	}
	if told > r.Dropped() || r.Dropped() > 0 && told == 0 {
		t.Errorf("events tell of %d dropped decisions; there are %d", told, r.Dropped())
	}
}

func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func readLines(t *testing.T, path string) [][]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n"))
}

func TestEndWritesWhatIsThere(t *testing.T) {
	r := NewRecorder(Options{})
	var out bytes.Buffer
	w := NewWriter(r, Format{}, discard, Target{Name: "out", Output: Stream{&out}, Gather: time.Hour})
	end := begin(w)
	for i := range 700 {
		in, d := deny(i)
		r.Record(in, d, instant)
	}
	end()
	if n := bytes.Count(out.Bytes(), []byte("\n")); n != 700 {
		t.Errorf("%d lines; want 700", n)
	}
}

// failing is a disk that has been full since it began, until free is set.
type failing struct {
	free  atomic.Bool
	tries atomic.Int32
	got   int
}

func (f *failing) Write(_ context.Context, lines [][]byte) (int, int, error) {
	f.tries.Add(1)
	if !f.free.Load() {
		return 0, 0, errors.New("no space left on device")
	}
	f.got += len(lines)
	return len(lines), 0, nil
}

func (f *failing) Close() error { return nil }

// What waits is written when there is space again; the log says each change once.
func TestLinesWaitForSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, out := NewRecorder(Options{}), &failing{}
		var said bytes.Buffer
		w := NewWriter(r, Format{}, slog.New(slog.NewTextHandler(&said, nil)), Target{Name: "file", Output: out})
		end := begin(w)
		for i := range 100 {
			in, d := deny(i)
			r.Record(in, d, instant)
		}
		time.Sleep(time.Minute)
		if n := out.tries.Load(); n < 5 || n > 20 {
			t.Errorf("%d tries in a minute", n)
		}
		out.free.Store(true)
		time.Sleep(maxRetry)
		synctest.Wait()
		end()
		if out.got != 100 || w.Stats("file") != (Stats{Written: 100}) {
			t.Errorf("%d lines written, %+v; want all", out.got, w.Stats("file"))
		}
		if log := said.String(); strings.Count(log, "decision log not written;") != 1 || strings.Count(log, "is written again") != 1 {
			t.Errorf("the log says %s", log)
		}
	})
}

func open(t *testing.T, o FileOptions) *File {
	t.Helper()
	f, err := OpenFile(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func write(t *testing.T, out Output, lines ...string) {
	t.Helper()
	var all [][]byte
	for _, l := range lines {
		all = append(all, []byte(l))
	}
	if n, refused, err := out.Write(t.Context(), all); n != len(lines) || refused != 0 || err != nil {
		t.Fatalf("%d written, %d refused, %v", n, refused, err)
	}
}

func TestFilesAreReplacedAndBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.jsonl")
	f := open(t, FileOptions{Path: path, MaxBytes: 20, Keep: 2})
	for i := range 30 {
		write(t, f, fmt.Sprintf("line %04d", i)) // ten bytes
	}
	for name, want := range map[string]string{path: "0028 0029", path + ".1": "0026 0027", path + ".2": "0024 0025"} {
		var got []string
		for _, l := range readLines(t, name) {
			got = append(got, strings.TrimPrefix(string(l), "line "))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s has %s; want %s", name, got, want)
		}
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if all, _ := filepath.Glob(path + "*"); len(all) != 3 {
		t.Errorf("there are %v", all)
	}
	alone := open(t, FileOptions{Path: path + "x", MaxBytes: 20})
	for range 5 {
		write(t, alone, "line 0000")
	}
	if all, _ := filepath.Glob(path + "x*"); len(all) != 1 {
		t.Errorf("without older files there are %v", all)
	}
}

// Where a full file cannot be put aside nothing is added to it.
func TestFileThatCannotBeReplacedDoesNotGrow(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "d.jsonl")
	if err := os.MkdirAll(filepath.Join(path+".1", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	f := open(t, FileOptions{Path: path, MaxBytes: 20, Keep: 1})
	write(t, f, "line 0000", "line 0001")
	for range 5 {
		if n, _, err := f.Write(t.Context(), [][]byte{[]byte("line 0002")}); n != 0 || err == nil {
			t.Fatalf("%d written, %v", n, err)
		}
	}
	if n := len(readLines(t, path)); n != 2 {
		t.Errorf("it has %d lines", n)
	}
	if err := os.RemoveAll(path + ".1"); err != nil {
		t.Fatal(err)
	}
	write(t, f, "line 0002")
	if n := len(readLines(t, path)); n != 1 {
		t.Errorf("the next file has %d lines", n)
	}
}

func TestHalfALineIsCutOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.jsonl")
	for content, want := range map[string]string{
		"a\nb\nhalf":                             "a\nb\nnew\n",
		"half":                                   "new\n",
		"a\n":                                    "a\nnew\n",
		"":                                       "new\n",
		"a\n" + strings.Repeat("x", 200_000):     "a\nnew\n",
		strings.Repeat("y", 70_000) + "\n" + "z": strings.Repeat("y", 70_000) + "\nnew\n",
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		f := open(t, FileOptions{Path: path, MaxBytes: 1 << 20})
		write(t, f, "new")
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%.20q became %.40q, %v; want %.40q", content, got, err, want)
		}
	}
}

func TestWhatIsNoFileIsRefused(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	if err := os.WriteFile(target, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, dir, filepath.Join(dir, "none", "d.jsonl"), "/dev/full"} {
		if f, err := OpenFile(FileOptions{Path: path, MaxBytes: 1}); err == nil {
			f.Close()
			t.Errorf("%s was opened", path)
		}
	}
}

func TestPackedFileIsWholeUpToACrash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.jsonl.gz")
	f := open(t, FileOptions{Path: path, MaxBytes: 1 << 20, Gzip: true})
	write(t, f, "a", "b")
	write(t, f, "c")
	again := open(t, FileOptions{Path: path, MaxBytes: 1 << 20, Gzip: true})
	write(t, again, "d")
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	zr, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(zr); err != nil || string(got) != "a\nb\nc\nd\n" {
		t.Errorf("unpacked %q, %v", got, err)
	}
}

// sink is the other side of an upload.
type sink struct {
	mu     sync.Mutex
	events []string
	codes  []int // of the next answers; then 200
	max    int   // events of one upload
	heads  []http.Header
}

func (s *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heads = append(s.heads, r.Header)
	if len(s.codes) > 0 {
		code := s.codes[0]
		s.codes = s.codes[1:]
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(code)
		return
	}
	zr, err := gzip.NewReader(r.Body)
	var events []json.RawMessage
	if err == nil {
		err = json.NewDecoder(zr).Decode(&events)
	}
	if err != nil || r.Method != http.MethodPost {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if s.max > 0 && len(events) > s.max {
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		return
	}
	for _, e := range events {
		s.events = append(s.events, string(e))
	}
}

func TestUploads(t *testing.T) {
	numbers := func(n int) (all []string) {
		for i := range n {
			all = append(all, fmt.Sprint(i))
		}
		return all
	}
	for name, tt := range map[string]struct {
		s                *sink
		lines            []string
		written, refused int
		fails            bool
	}{
		"all":                 {&sink{}, numbers(3), 3, 0, false},
		"more than one chunk": {&sink{}, numbers(chunkEvents + 1), chunkEvents + 1, 0, false},
		"in halves":           {&sink{max: 2}, numbers(9), 9, 0, false},
		"one is too large":    {&sink{codes: []int{413}}, numbers(1), 0, 1, true},
		"refused":             {&sink{codes: []int{400}}, numbers(3), 0, 3, true},
		"later":               {&sink{codes: []int{503}}, numbers(3), 0, 0, true},
		"not let in":          {&sink{codes: []int{401}}, numbers(3), 0, 0, true},
		"sent elsewhere":      {&sink{codes: []int{307}}, numbers(3), 0, 0, true},
		"the second chunk later": {
			&sink{}, numbers(chunkEvents + 1), chunkEvents, 0, true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := tt.s
			srv := httptest.NewTLSServer(s)
			defer srv.Close()
			calls := 0
			u := &Upload{URLs: func() []string {
				if calls++; name == "the second chunk later" && calls == 2 {
					return nil
				}
				return []string{srv.URL + "/logs"}
			}, Client: srv.Client(), Token: func() (string, error) { return "secret\n", nil }}
			var lines [][]byte
			for _, l := range tt.lines {
				lines = append(lines, []byte(l))
			}
			written, refused, err := u.Write(t.Context(), lines)
			if written != tt.written || refused != tt.refused || (err != nil) != tt.fails {
				t.Errorf("%d written, %d refused, %v; want %d, %d", written, refused, err, tt.written, tt.refused)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error has the token: %v", err)
			}
			if got := strings.Join(s.events, " "); got != strings.Join(tt.lines[:tt.written], " ") {
				t.Errorf("it got %.100s", got)
			}
			if len(s.heads) > 0 {
				h := s.heads[0]
				if h.Get("Authorization") != "Bearer secret" || h.Get("Content-Type") != "application/json" || h.Get("Content-Encoding") != "gzip" {
					t.Errorf("sent with %v", h)
				}
			}
			srv.Client().CloseIdleConnections()
		})
	}
}

// After a failure the next address is tried, and lines wait meanwhile.
func TestUploadGoesElsewhere(t *testing.T) {
	s := &sink{}
	srv := httptest.NewTLSServer(s)
	defer srv.Close()
	r := NewRecorder(Options{})
	u := &Upload{URLs: func() []string { return []string{"https://127.0.0.1:1/logs", srv.URL + "/logs"} }, Client: srv.Client()}
	w := NewWriter(r, Format{}, discard, Target{Name: "upload", Output: u})
	end := begin(w)
	in, d := deny(1)
	r.Record(in, d, instant)
	waitFor(t, "the upload", func() bool { return w.Stats("upload").Written == 1 })
	end()
	srv.Client().CloseIdleConnections()
	if len(s.events) != 1 || !strings.Contains(s.events[0], d.DecisionID.String()) {
		t.Errorf("uploaded %q", s.events)
	}
}

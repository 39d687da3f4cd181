// The server's and the client's side of OPA's bundle protocol.

package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// shelf is a source with one bundle called main.
type shelf struct {
	mu      sync.Mutex // guards what follows
	current *Published
	changed chan struct{}
	err     error
	loads   chan struct{} // receives at each load, when not nil
}

func newShelf(p *Published) *shelf { return &shelf{current: p, changed: make(chan struct{})} }

func (s *shelf) load(_ context.Context, name string) (*Published, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.loads != nil {
		s.loads <- struct{}{}
	}
	if s.err != nil || name != "main" || s.current == nil {
		return nil, s.changed, errors.Join(s.err, map[bool]error{true: ErrNotFound}[s.err == nil])
	}
	return s.current, s.changed, nil
}

func (s *shelf) publish(p *Published) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = p
	close(s.changed)
	s.changed = make(chan struct{})
}

const bundleURL = "/v1/policy/bundles/main"

func do(t testing.TB, h http.Handler, method, path string, header http.Header) *http.Response {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
	maps.Copy(r.Header, header)
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func TestServerSpeaksTheBundleProtocol(t *testing.T) {
	p := published([]byte("bundle"), 7)
	h := NewServer(Source{Load: newShelf(p).load})
	tests := map[string]struct {
		method, path string
		header       http.Header
		status       int
		body         string
	}{
		"get":                   {"GET", bundleURL, nil, 200, "bundle"},
		"head":                  {"HEAD", bundleURL, nil, 200, ""},
		"same tag":              {"GET", bundleURL, http.Header{"If-None-Match": {p.ETag}}, 304, ""},
		"weak tag":              {"GET", bundleURL, http.Header{"If-None-Match": {"W/" + p.ETag}}, 304, ""},
		"list":                  {"GET", bundleURL, http.Header{"If-None-Match": {`"a,b" , ` + p.ETag + `,"c"`}}, 304, ""},
		"two lines":             {"GET", bundleURL, http.Header{"If-None-Match": {`"a"`, p.ETag}}, 304, ""},
		"star":                  {"GET", bundleURL, http.Header{"If-None-Match": {"*"}}, 304, ""},
		"other tag":             {"GET", bundleURL, http.Header{"If-None-Match": {`"6-aa"`}}, 200, "bundle"},
		"tag without quotes":    {"GET", bundleURL, http.Header{"If-None-Match": {strings.Trim(p.ETag, `"`)}}, 200, "bundle"},
		"tag inside another":    {"GET", bundleURL, http.Header{"If-None-Match": {`"x` + strings.Trim(p.ETag, `"`) + `"`}}, 200, "bundle"},
		"open tag":              {"GET", bundleURL, http.Header{"If-None-Match": {`"`}}, 200, "bundle"},
		"wait without tag":      {"GET", bundleURL, http.Header{"Prefer": {"modes=snapshot,delta;wait=60"}}, 200, "bundle"},
		"other name":            {"GET", "/v1/policy/bundles/other", nil, 404, `{"error":"no such policy bundle"}` + "\n"},
		"bad name":              {"GET", "/v1/policy/bundles/%2e%2e%2fx", nil, 404, `{"error":"no such policy bundle"}` + "\n"},
		"put is not offered":    {"PUT", bundleURL, nil, 405, "Method Not Allowed\n"},
		"delete is not offered": {"DELETE", bundleURL, nil, 405, "Method Not Allowed\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			resp := do(t, h, tt.method, tt.path, tt.header)
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tt.status || string(body) != tt.body {
				t.Errorf("%d %q; want %d %q", resp.StatusCode, body, tt.status, tt.body)
			}
			if tt.status >= 400 {
				return
			}
			if ct, etag := resp.Header.Get("Content-Type"), resp.Header.Get("ETag"); ct != ContentType || etag != p.ETag {
				t.Errorf("content type %q, ETag %q", ct, etag)
			}
		})
	}
}

func TestServerHidesWhyItCannotLoad(t *testing.T) {
	s := newShelf(nil)
	s.err = errors.New("secret detail")
	resp := do(t, NewServer(Source{Load: s.load}), "GET", bundleURL, nil)
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" || strings.Contains(string(body), "secret") {
		t.Errorf("%d %s %q", resp.StatusCode, resp.Header, body)
	}
}

func TestLongPollWakesOnANewGeneration(t *testing.T) {
	first, second := published([]byte("one"), 1), published([]byte("two"), 2)
	s := newShelf(first)
	s.loads = make(chan struct{}, 8)
	h := NewServer(Source{Load: s.load})
	answer := make(chan *http.Response, 1)
	go func() {
		answer <- do(t, h, "GET", bundleURL, http.Header{"If-None-Match": {first.ETag}, "Prefer": {"modes=snapshot;wait=60"}})
	}()
	<-s.loads // it has the channel that publish closes
	s.publish(second)
	resp := <-answer
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 200 || string(body) != "two" || resp.Header.Get("ETag") != second.ETag {
		t.Errorf("%d %q %s", resp.StatusCode, body, resp.Header)
	}
}

func TestLongPollEndsWith304AndWithItsClient(t *testing.T) {
	p := published([]byte("one"), 1)
	h := NewServer(Source{Load: newShelf(p).load, MaxWait: 20 * time.Millisecond})
	header := http.Header{"If-None-Match": {p.ETag}, "Prefer": {"wait=3600"}}
	if resp := do(t, h, "GET", bundleURL, header); resp.StatusCode != http.StatusNotModified {
		t.Errorf("status %d; want 304", resp.StatusCode)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r := httptest.NewRequestWithContext(ctx, "GET", bundleURL, nil)
	r.Header = header
	NewServer(Source{Load: newShelf(p).load}).ServeHTTP(httptest.NewRecorder(), r) // returns
}

func TestPreferredWait(t *testing.T) {
	for prefer, want := range map[string]time.Duration{
		"": 0, "modes=snapshot,delta;wait=10": 10 * time.Second, "wait=5": 5 * time.Second, `Wait = "7"`: 7 * time.Second,
		"respond-async, wait=3": 3 * time.Second, "wait": 0, "wait=x": 0, "wait=-1": 0, "wait=99999999999999999999": 0, "await=9": 0,
	} {
		if got := preferredWait(http.Header{"Prefer": {prefer}}); got != want {
			t.Errorf("preferredWait(%q) = %v; want %v", prefer, got, want)
		}
	}
}

func TestPut(t *testing.T) {
	var got []byte
	h := NewServer(Source{
		Load: newShelf(nil).load,
		Put: func(_ context.Context, name string, unsigned []byte) (Metadata, error) {
			got = unsigned
			switch string(unsigned) {
			case "bad":
				return Metadata{}, &RejectedError{errors.New("grants.yaml:1:1: typo")}
			case "broken":
				return Metadata{}, errors.New("secret detail")
			}
			return Metadata{Name: name, Generation: 8}, nil
		},
	})
	tests := map[string]struct {
		name, body string
		status     int
		want       string
	}{
		"accepted":  {"main", "good", 200, `{"generation":8,"name":"main"}`},
		"rejected":  {"main", "bad", 422, `{"error":"grants.yaml:1:1: typo"}`},
		"broken":    {"main", "broken", 500, `{"error":"internal error"}`},
		"bad name":  {"MAIN", "good", 400, "lower-case"},
		"too large": {"main", strings.Repeat("x", MaxBytes+1), 413, "at most"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got = nil
			r := httptest.NewRequestWithContext(t.Context(), "PUT", "/v1/policy/bundles/"+tt.name, strings.NewReader(tt.body))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != tt.status || !strings.Contains(w.Body.String(), tt.want) {
				t.Errorf("%d %s; want %d %s", w.Code, w.Body, tt.status, tt.want)
			}
			if tt.status >= 400 && tt.status < 420 && got != nil {
				t.Error("the source saw a refused body")
			}
		})
	}
}

func TestFetch(t *testing.T) {
	p := published([]byte("bundle"), 7)
	good := NewServer(Source{Load: newShelf(p).load})
	plain := func(status int, contentType string, body []byte) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(status)
			_, _ = w.Write(body)
		})
	}
	tests := map[string]struct {
		h    http.Handler
		etag string
		want string // of the error; empty: success
	}{
		"new":          {good, "", ""},
		"newer":        {good, `"6-aa"`, ""},
		"not modified": {good, p.ETag, ErrNotModified.Error()},
		"unasked 304":  {plain(304, ContentType, nil), "", "status 304"},
		"redirect":     {plain(302, ContentType, nil), "", "status 302"},
		"server error": {plain(500, ContentType, []byte("x")), "", "status 500"},
		"created":      {plain(201, ContentType, []byte("x")), "", "status 201"},
		"not found":    {plain(404, ContentType, nil), "", ErrNotFound.Error()},
		"content type": {plain(200, "text/html", []byte("x")), "", `content type "text/html"`},
		"parameters":   {plain(200, ContentType+"; charset=utf-8", []byte("x")), "", "content type"},
		"too large":    {plain(200, ContentType, make([]byte, MaxBytes+1)), "", "more than"},
		"largest":      {plain(200, ContentType, make([]byte, MaxBytes)), "", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(tt.h)
			defer srv.Close()
			raw, etag, err := Fetch(t.Context(), srv.Client(), srv.URL+bundleURL, tt.etag)
			if tt.want == "" {
				if err != nil || len(raw) == 0 || tt.h == good && (etag != p.ETag || !bytes.Equal(raw, p.Raw)) {
					t.Errorf("Fetch = %d bytes, %q, %v", len(raw), etag, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || raw != nil {
				t.Errorf("error %v; want %q", err, tt.want)
			}
		})
	}
}

// published is raw as a source gives it.
func published(raw []byte, generation uint64) *Published {
	return &Published{Raw: raw, ETag: fmt.Sprintf(`"%d"`, generation), Generation: generation}
}

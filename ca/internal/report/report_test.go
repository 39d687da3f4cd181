// What is kept of an upload, what is refused, and that nothing of it grows without
// bounds.

package report

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// status is what a stock OPA 1.22.2 sends, shortened.
const status = `{"labels":{"id":"i1","version":"1.22.2"},"bundles":{
	"main":{"name":"main","active_revision":"7","last_successful_activation":"2026-11-26T04:00:00Z","last_successful_download":"2026-11-26T04:00:00Z","last_request":"2026-11-26T04:01:00Z","metrics":{"timer_rego_load_bundles_ns":1}},
	"extra":{"name":"extra","code":"bundle_error","message":"not found"}},
	"metrics":{"prometheus":{}},"plugins":{"bundle":{"state":"OK"}}}`

func TestStatusIsRead(t *testing.T) {
	got, err := ParseStatus([]byte(status))
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 11, 26, 4, 0, 0, 0, time.UTC)
	want := Instance{ID: "i1", Labels: map[string]string{"id": "i1", "version": "1.22.2"}, Bundles: []BundleStatus{
		{Name: "extra", Code: "bundle_error", Message: "not found"},
		{Name: "main", Revision: "7", Activated: at, Requested: at.Add(time.Minute)},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestMalformedStatusIsRefused(t *testing.T) {
	long, many := strings.Repeat("x", maxText+1), &strings.Builder{}
	for i := range maxBundles + 1 {
		fmt.Fprintf(many, `%q:{},`, fmt.Sprint(i))
	}
	for name, body := range map[string]string{
		"empty":            ``,
		"an array":         `[]`,
		"no id":            `{"labels":{"version":"1"}}`,
		"a long label":     `{"labels":{"id":"` + long + `"}}`,
		"a long revision":  `{"labels":{"id":"i"},"bundles":{"main":{"active_revision":"` + long + `"}}}`,
		"too many bundles": `{"labels":{"id":"i"},"bundles":{` + strings.TrimSuffix(many.String(), ",") + `}}`,
		"a bad time":       `{"labels":{"id":"i"},"bundles":{"main":{"last_request":"soon"}}}`,
	} {
		if _, err := ParseStatus([]byte(body)); !errors.As(err, new(*InvalidError)) {
			t.Errorf("%s: %v; want an InvalidError", name, err)
		}
	}
}

func TestStatusesAreBounded(t *testing.T) {
	now := time.Date(2026, 11, 26, 4, 0, 0, 0, time.UTC)
	var s Statuses
	put := func(uploader string, n int, at time.Time) bool {
		return s.Put(Instance{Uploader: uploader, ID: fmt.Sprint(n), Received: at})
	}
	for n := range maxPerUploader + 5 {
		put("a", n, now.Add(time.Duration(n)))
	}
	if all := s.Instances(now); len(all) != maxPerUploader {
		t.Errorf("one uploader has %d instances; want %d", len(all), maxPerUploader)
	}
	if has := s.has("a", "4"); has {
		t.Error("the oldest of its instances is still there")
	}
	for u := 0; len(s.by) < maxInstances; u++ { // as Put would, which looks at all each time
		in := Instance{Uploader: "u", ID: fmt.Sprint(u), Received: now}
		s.by[instanceKey{in.Uploader, in.ID}] = in
	}
	if put("z", 1, now) || s.has("z", "1") {
		t.Error("there was room for one more")
	}
	if !put("a", 5, now) {
		t.Error("who is known already has no room")
	}
	later := now.Add(ForgetAfter + time.Minute)
	if n := len(s.Instances(later)); n != 0 {
		t.Errorf("%d instances that have been silent for long; want none", n)
	}
	if !put("z", 1, later) || len(s.Instances(later)) != 1 || len(s.by) != 1 {
		t.Errorf("%d instances later; want the one that spoke", len(s.by))
	}
}

func (s *Statuses) has(uploader, id string) bool {
	_, ok := s.by[instanceKey{uploader, id}]
	return ok
}

// What an instance calls a bundle is its own affair; what its token is for is not.
func TestWhichBundleAStatusIsAbout(t *testing.T) {
	for name, tt := range map[string]struct {
		of    string // the token
		names []string
		want  string // about "main"
	}{
		"by a token, by name":     {"main", []string{"main", "other"}, "main"},
		"by a token, the only":    {"main", []string{"authz"}, "authz"},
		"by a token, neither":     {"main", []string{"authz", "other"}, ""},
		"by another's token":      {"other", []string{"main"}, ""},
		"by an SVID, by name":     {"", []string{"authz", "main"}, "main"},
		"by an SVID, not by name": {"", []string{"authz"}, ""},
		"without a bundle":        {"main", nil, ""},
	} {
		in := Instance{PolicyBundle: tt.of}
		for _, n := range tt.names {
			in.Bundles = append(in.Bundles, BundleStatus{Name: n})
		}
		if got, ok := in.Of("main"); got.Name != tt.want || ok != (tt.want != "") {
			t.Errorf("%s: %q, %v; want %q", name, got.Name, ok, tt.want)
		}
	}
}

func request(body []byte, encoding string) *http.Request {
	return &http.Request{Header: http.Header{"Content-Encoding": {encoding}}, Body: io.NopCloser(bytes.NewReader(body))}
}

func packed(t testing.TB, n int, from io.Reader) []byte {
	t.Helper()
	var out bytes.Buffer
	zw, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(zw, from, int64(n)); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// SECURITY.md T29: the limit is the limit, and one more is refused.
func TestBodiesAreBounded(t *testing.T) {
	for name, tt := range map[string]struct {
		r    *http.Request
		want error
		n    int
	}{
		"plain, full":    {request(make([]byte, MaxBytes), ""), nil, MaxBytes},
		"plain, more":    {request(make([]byte, MaxBytes+1), ""), ErrTooLarge, 0},
		"packed, full":   {request(packed(t, MaxUnpackedBytes, zeros{}), "gzip"), nil, MaxUnpackedBytes},
		"packed, more":   {request(packed(t, MaxUnpackedBytes+1, zeros{}), "gzip"), ErrTooLarge, 0},
		"a bomb":         {request(packed(t, 2*MaxUnpackedBytes, zeros{}), "gzip"), ErrTooLarge, 0},
		"not packed":     {request([]byte("[]"), "gzip"), new(InvalidError), 0},
		"cut off":        {request(packed(t, 1000, zeros{})[:20], "gzip"), new(InvalidError), 0},
		"another coding": {request([]byte("[]"), "br"), new(InvalidError), 0},
	} {
		body, err := ReadBody(tt.r)
		_, wantsInvalid := tt.want.(*InvalidError) //nolint:errorlint // of the table
		if len(body) != tt.n || wantsInvalid != errors.As(err, new(*InvalidError)) || !wantsInvalid && !errors.Is(err, tt.want) {
			t.Errorf("%s: %d bytes, %v; want %d, %v", name, len(body), err, tt.n, tt.want)
		}
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(status))
	f.Fuzz(func(t *testing.T, body []byte) {
		in, err := ParseStatus(body)
		if err != nil {
			return
		}
		if in.ID == "" || len(in.Bundles) > maxBundles || len(in.Labels) > maxLabels {
			t.Fatalf("%+v", in)
		}
	})
}

// A kubelet that is late, away, or not the right one.

package kubelet

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"merlon.dev/sdk/svid/forge"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	web    = "3333333333333333333333333333333333333333333333333333333333333333"
	webPod = "7f2a3c1e-5b64-4d0e-9a37-2f8f5f3a9c10"
	token  = "eyJ.the.token"
)

// server is a kubelet over TLS.
type server struct {
	*httptest.Server
	requests atomic.Int32
	answer   atomic.Pointer[http.HandlerFunc]
	dir      string
}

func fixture(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/pods.json")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// newServer serves the pods of the fixture to who has the token.
func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{dir: t.TempDir()}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		if r.URL.Path != "/pods" || r.Header.Get("Authorization") != "Bearer "+token {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		(*s.answer.Load())(w, r)
	}))
	t.Cleanup(s.Close)
	s.serve(fixture(t))
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := errors.Join(os.WriteFile(s.file("ca.crt"), ca, 0o600), os.WriteFile(s.file("token"), []byte(token+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) file(name string) string { return filepath.Join(s.dir, name) }

func (s *server) serve(body []byte) {
	s.do(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) })
}

func (s *server) do(answer http.HandlerFunc) { s.answer.Store(&answer) }

// client asks s. Nothing that is waited for in a test takes longer than it must.
func (s *server) client(t *testing.T, change func(*Config)) *Client {
	t.Helper()
	cfg := Config{
		Address: strings.TrimPrefix(s.URL, "https://"), TokenFile: s.file("token"), CAFile: s.file("ca.crt"),
		Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.timing = timing{freshness: time.Minute, patience: 50 * time.Millisecond, pause: time.Millisecond, memory: time.Minute, keep: time.Hour}
	t.Cleanup(c.Close)
	return c
}

func TestContainersOfTheNode(t *testing.T) {
	c := newServer(t).client(t, nil)
	pod := []string{
		"k8s:node-name:node-1", "k8s:ns:shop", "k8s:pod-label:app.kubernetes.io/name:web", "k8s:pod-label:pod-template-hash:5d9c7b9f6d",
		"k8s:pod-label:tier:", "k8s:pod-name:web-5d9c7b9f6d-x2x9k", "k8s:pod-owner:ReplicaSet:web-5d9c7b9f6d", "k8s:sa:web",
	}
	of := func(name, image, digest string, pod ...string) []string {
		return slices.Sorted(slices.Values(append(pod, "k8s:container-name:"+name, "k8s:container-image:"+image, "k8s:container-image:"+digest)))
	}
	for name, tt := range map[string]struct {
		id, pod string
		want    []string
	}{
		"a container": {web, webPod, of("web", "registry.example.org/shop/web:1.4.2", "registry.example.org/shop/web@sha256:"+strings.Repeat("c", 64), pod...)},
		"one to start with": {
			strings.Repeat("1", 64), webPod,
			of("migrate", "registry.example.org/shop/migrate:1.4.2", "registry.example.org/shop/migrate@sha256:"+strings.Repeat("a", 64), pod...),
		},
		"one to look with": {
			strings.Repeat("4", 64), webPod,
			of("debugger-7k2", "docker.io/library/busybox:1.36", "docker.io/library/busybox@sha256:"+strings.Repeat("d", 64), pod...),
		},
		"one of a static pod": {
			strings.Repeat("5", 64), "0123456789abcdef0123456789abcdef",
			of("kube-proxy", "registry.k8s.io/kube-proxy:v1.34.1", "registry.k8s.io/kube-proxy@sha256:"+strings.Repeat("e", 64),
				"k8s:node-name:node-1", "k8s:ns:kube-system", "k8s:pod-name:kube-proxy-node-1"),
		},
	} {
		got, err := c.Container(t.Context(), tt.pod, tt.id)
		if err != nil || !slices.Equal(got.Selectors, tt.want) {
			t.Errorf("%s: Container() = %q, %v; want %q", name, got.Selectors, err, tt.want)
		}
	}
}

// T5: the pod of the control group and that of the kubelet must be the same.
func TestContainerOfAnotherPodProvesNothing(t *testing.T) {
	c := newServer(t).client(t, nil)
	for name, tt := range map[string]struct{ pod, id string }{
		"its container in another pod":    {"c0ffee00-1234-4abc-8def-000000000001", web},
		"no such container":               {webPod, strings.Repeat("0", 64)},
		"the container before this one":   {webPod, strings.Repeat("9", 64)},
		"a container that is not there":   {"c0ffee00-1234-4abc-8def-000000000001", ""},
		"the start of the container's ID": {webPod, web[:32]},
	} {
		if got, err := c.Container(t.Context(), tt.pod, tt.id); !errors.Is(err, ErrNotListed) || len(got.Selectors) != 0 {
			t.Errorf("%s: Container() = %q, %v; want ErrNotListed", name, got.Selectors, err)
		}
	}
}

// The kubelet lists a container some time after it runs.
func TestContainerIsWaitedFor(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	c.timing.patience = time.Minute
	s.serve([]byte(`{"kind":"PodList","items":[]}`))
	done := make(chan error, 1)
	go func() {
		got, err := c.Container(context.Background(), webPod, web)
		if err == nil && !slices.Contains(got.Selectors, "k8s:ns:shop") {
			err = fmt.Errorf("selectors = %q", got.Selectors)
		}
		done <- err
	}()
	for s.requests.Load() < 3 {
		time.Sleep(time.Millisecond)
	}
	s.serve(fixture(t))
	if err := <-done; err != nil {
		t.Errorf("Container() = %v; want it once it is listed", err)
	}
}

// Waiting has an end, and who waited in vain does not wait again at once.
func TestWaitingIsBounded(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	unknown := strings.Repeat("0", 64)
	if _, err := c.Container(t.Context(), webPod, unknown); !errors.Is(err, ErrNotListed) {
		t.Fatalf("Container() = %v; want ErrNotListed", err)
	}
	asked := s.requests.Load()
	for range 100 {
		if _, err := c.Container(t.Context(), webPod, unknown); !errors.Is(err, ErrNotListed) {
			t.Fatalf("Container() = %v; want ErrNotListed", err)
		}
	}
	if got := s.requests.Load(); got != asked {
		t.Errorf("%d requests more after it was waited for in vain; want none", got-asked)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c.timing.patience = time.Hour
	if _, err := c.Container(ctx, webPod, strings.Repeat("e", 64)); !errors.Is(err, context.Canceled) {
		t.Errorf("Container() = %v for a caller that went; want Canceled", err)
	}
}

// However many ask, the kubelet is asked once.
func TestManyShareOneRequest(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	gate := make(chan struct{})
	body := fixture(t)
	s.do(func(w http.ResponseWriter, _ *http.Request) { <-gate; _, _ = w.Write(body) })
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			if _, err := c.Container(t.Context(), webPod, web); err != nil {
				t.Errorf("Container() = %v", err)
			}
		})
	}
	close(gate)
	all.Wait()
	if got := s.requests.Load(); got != 1 {
		t.Errorf("%d requests for 200 who ask; want 1", got)
	}
}

// A label that changed counts once the list is not fresh any more.
func TestChangedLabelCounts(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	if _, err := c.Container(t.Context(), webPod, web); err != nil {
		t.Fatal(err)
	}
	s.serve([]byte(strings.ReplaceAll(string(fixture(t)), `"app.kubernetes.io/name": "web"`, `"app.kubernetes.io/name": "other"`)))
	has := func(selector string) bool {
		got, err := c.Container(t.Context(), webPod, web)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(got.Selectors, selector)
	}
	if !has("k8s:pod-label:app.kubernetes.io/name:web") {
		t.Error("the list was asked for again while it was fresh")
	}
	c.timing.freshness = 0
	if has("k8s:pod-label:app.kubernetes.io/name:web") || !has("k8s:pod-label:app.kubernetes.io/name:other") {
		t.Error("the old label is proved by a list that is not fresh")
	}
}

// A kubelet that is away: what it said before stays, for an hour; of what it did
// not speak of nothing is known.
func TestKubeletThatIsAwayTakesNothing(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	if _, err := c.Container(t.Context(), webPod, web); err != nil {
		t.Fatal(err)
	}
	s.do(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	c.timing.freshness = 0
	if got, err := c.Container(t.Context(), webPod, web); err != nil || len(got.Selectors) == 0 {
		t.Errorf("Container() = %q, %v while the kubelet is away; want what it said before", got.Selectors, err)
	}
	if _, err := c.Container(t.Context(), webPod, strings.Repeat("0", 64)); err == nil || errors.Is(err, ErrNotListed) || !strings.Contains(err.Error(), "503") {
		t.Errorf("Container() = %v for what the kubelet did not speak of; want its failure", err)
	}
	c.timing.keep = 0
	if _, err := c.Container(t.Context(), webPod, web); err == nil || errors.Is(err, ErrNotListed) {
		t.Errorf("Container() = %v by a list that is too old; want the failure", err)
	}
	s.serve(fixture(t))
	c.timing.keep = time.Hour
	if _, err := c.Container(t.Context(), webPod, web); err != nil {
		t.Errorf("Container() = %v when the kubelet is back", err)
	}
}

func TestAnswersThatAreRefused(t *testing.T) {
	listOf := func(statuses string) []byte {
		return []byte(`{"kind":"PodList","items":[{"metadata":{"uid":"u"},"status":{"containerStatuses":[` + statuses + `]}}]}`)
	}
	huge := append([]byte(`{"kind":"PodList","items":[],"x":"`), make([]byte, maxListBytes)...)
	for name, tt := range map[string]struct {
		answer http.HandlerFunc
		change func(t *testing.T, s *server, cfg *Config)
		want   string
	}{
		"another kind":       {write([]byte(`{"kind":"Status","status":"Failure"}`)), nil, `it is a "Status"`},
		"not JSON":           {write([]byte("<html>")), nil, "list of pods"},
		"a container twice":  {write(listOf(`{"containerID":"c://1"},{"containerID":"d://1"}`)), nil, "twice"},
		"more than there is": {write(huge), nil, "more than"},
		"cut off":            {write(listOf("{")), nil, "list of pods"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://203.0.113.1/pods", http.StatusFound)
		}, nil, "302"},
		"forbidden":            {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, nil, "nodes/proxy"},
		"the wrong token":      {nil, func(t *testing.T, s *server, _ *Config) { rewrite(t, s.file("token"), "another") }, "nodes/proxy"},
		"no token":             {nil, func(t *testing.T, _ *server, c *Config) { c.TokenFile = filepath.Join(t.TempDir(), "none") }, "no such file"},
		"an empty token":       {nil, func(t *testing.T, s *server, _ *Config) { rewrite(t, s.file("token"), "\n") }, "no bearer token"},
		"a token of two lines": {nil, func(t *testing.T, s *server, _ *Config) { rewrite(t, s.file("token"), "a\r\nX: y") }, "no bearer token"},
		"another CA's kubelet": {nil, func(t *testing.T, _ *server, c *Config) { c.CAFile = newCA(t) }, "certificate"},
		"another host's certificate": {nil, func(_ *testing.T, _ *server, c *Config) {
			_, port, _ := strings.Cut(c.Address, ":")
			c.Address = "localhost:" + port
		}, "certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			if tt.answer != nil {
				s.do(tt.answer)
			}
			c := s.client(t, func(cfg *Config) {
				if tt.change != nil {
					tt.change(t, s, cfg)
				}
			})
			if _, err := c.Container(t.Context(), webPod, web); err == nil || errors.Is(err, ErrNotListed) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Container() = %v; want an error that says %q", err, tt.want)
			}
		})
	}
}

func write(body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }
}

func rewrite(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Kubernetes renews the token in its file.
func TestTokenIsReadAgain(t *testing.T) {
	s := newServer(t)
	c := s.client(t, nil)
	rewrite(t, s.file("token"), "expired")
	if _, err := c.Container(t.Context(), webPod, web); err == nil {
		t.Fatal("the wrong token was accepted")
	}
	rewrite(t, s.file("token"), token)
	if _, err := c.Container(t.Context(), webPod, web); err != nil {
		t.Errorf("Container() = %v with the new token", err)
	}
}

func TestCAFileMustHoldCertificates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca.crt")
	for _, cfg := range []Config{{CAFile: path + ".none"}, {CAFile: path}} {
		rewrite(t, path, "nothing")
		if _, err := New(cfg); err == nil {
			t.Errorf("New(%+v) went well; want an error", cfg)
		}
	}
}

func FuzzParse(f *testing.F) {
	b, err := os.ReadFile("testdata/pods.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"kind":"PodList","items":[{"metadata":{"uid":"u","labels":{"a:b":"c","d":"e f"}},"status":{"containerStatuses":[{"containerID":"x://y"}]}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		containers, err := parse(b)
		if err != nil && containers != nil {
			t.Errorf("parse() = %d containers with %v", len(containers), err)
		}
		for id, c := range containers {
			if id == "" || c.podUID == "" || !slices.IsSorted(c.Selectors) {
				t.Errorf("container %q of pod %q: %q", id, c.podUID, c.Selectors)
			}
			for _, s := range c.Selectors {
				if !strings.HasPrefix(s, "k8s:") || strings.HasPrefix(s, "k8s:pod-uid:") || strings.HasPrefix(s, "k8s:qos:") ||
					strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) {
					t.Errorf("selector %q", s)
				}
			}
		}
	})
}

func BenchmarkContainer(b *testing.B) {
	c := &Client{timing: usual, asked: time.Now()}
	containers, err := parse(func() []byte { body, _ := os.ReadFile("testdata/pods.json"); return body }())
	if err != nil {
		b.Fatal(err)
	}
	c.listed = list{at: time.Now(), containers: containers}
	c.timing.freshness = time.Hour
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Container(b.Context(), webPod, web); err != nil {
			b.Fatal(err)
		}
	}
}

// newCA is the certificate of a CA that nobody knows.
func newCA(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.crt")
	rewrite(t, path, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: forge.New(t, "other.test").Cert.Raw})))
	return path
}

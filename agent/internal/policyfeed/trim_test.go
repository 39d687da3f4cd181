// A service that leaves the node takes its grants with it, and one that comes while a
// bundle is on its way gets them.

package policyfeed

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
	"merlon.dev/sdk/seal"
)

// authority is a CA's side of the feed: the shares of generation 1 and of candidate 2
// for the services of one node. Its server is the one that a CA has.
type authority struct {
	t       *testing.T
	key     *ecdsa.PrivateKey
	parts   *bundle.Shares
	handler http.Handler

	mu       sync.Mutex
	services []string // guarded by mu
	away     bool     // guarded by mu
	asked    int      // guarded by mu
	// generation is the one in force. Guarded by mu.
	generation uint64
	view       []string // guarded by mu; what the node knows of its services; nil: it knows all
	// answered is called once an answer is made, and not taken yet. Set it before use.
	answered func()
}

func newAuthority(t *testing.T, services ...string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	var grants []grant.Grant
	for _, name := range services {
		grants = append(grants, grant.Grant{ID: "to-" + name, To: []string{"spiffe://shop.test/" + name}, HTTP: &grant.HTTP{}})
	}
	a := &authority{t: t, key: key, generation: 1, services: services, parts: bundle.NewShares(&bundle.Contents{Modules: map[string]string{engine.ModuleName: engine.Module}, Grants: grants})}
	a.handler = bundle.NewServer(bundle.Source{Load: a.load(a.inForce, false), LoadCandidate: a.load(func() uint64 { return 2 }, true)})
	return a
}

func (a *authority) load(of func() uint64, candidate bool) func(context.Context, string) (*bundle.Published, <-chan struct{}, error) {
	return func(context.Context, string) (*bundle.Published, <-chan struct{}, error) {
		audience, generation := a.destinations(), of()
		unsigned, err := a.parts.Of(audience)
		if err != nil {
			return nil, nil, err
		}
		raw, err := bundle.Sign(unsigned, bundle.Metadata{
			Name: "main", TrustDomain: "shop.test", Generation: generation, IssuedAt: time.Now(), Audience: audience, Candidate: candidate,
		}, "k", a.key)
		return &bundle.Published{Raw: raw, ETag: fmt.Sprintf("%q", fmt.Sprintf("%d-%x", generation, sha256.Sum256(unsigned))), Generation: generation}, nil, err
	}
}

func (a *authority) destinations() (ids []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, name := range a.services {
		ids = append(ids, "spiffe://shop.test/"+name)
	}
	return ids
}

func (a *authority) inForce() uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.generation
}

func (a *authority) leaves(services ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.services = slices.DeleteFunc(slices.Clone(a.services), func(s string) bool { return slices.Contains(services, s) })
}

func (a *authority) comes(service string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.services = append(slices.Clone(a.services), service)
	slices.Sort(a.services)
}

func (a *authority) goesAway(away bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.away = away
}

func (a *authority) requests() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked
}

// RoundTrip answers within the process: time in the test is not that of sockets.
func (a *authority) RoundTrip(r *http.Request) (*http.Response, error) {
	a.mu.Lock()
	a.asked++
	away := a.away
	a.mu.Unlock()
	if away {
		return nil, errors.New("connection refused")
	}
	w := httptest.NewRecorder()
	a.handler.ServeHTTP(w, r)
	if a.answered != nil {
		a.answered()
	}
	return w.Result(), nil
}

func (a *authority) announcement() *capb.PolicyBundle {
	der, err := x509.MarshalPKIXPublicKey(&a.key.PublicKey)
	if err != nil {
		a.t.Fatal(err)
	}
	return &capb.PolicyBundle{
		Name: "main", Generation: 1, Keys: []*capb.PolicyKey{{Kid: "k", PublicKey: der}},
		Candidate: &capb.PolicyCandidate{Generation: 2, Step: 1, Stage: capb.PolicyStage_POLICY_STAGE_SHADOW},
	}
}

func TestServicesThatLeaveTakeTheirGrantsWithThem(t *testing.T) {
	a := newAuthority(t, "orders", "stock", "web")
	dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		f, end := a.feed(t, dir)
		want := func(what string, services ...string) {
			t.Helper()
			synctest.Wait()
			for which, e := range map[string]*engine.Engine{"policy": f.Now().Active, "candidate": f.Now().Candidate} {
				if e == nil {
					t.Fatalf("%s: no %s; fault %q", what, which, f.Fault())
				}
				got := strings.ReplaceAll(strings.Join(e.Audience(), " "), "spiffe://shop.test/", "")
				if got != strings.Join(services, " ") || e.Grants() != len(services) {
					t.Errorf("%s: the %s has %d grants for %q; want those of %q", what, which, e.Grants(), got, services)
				}
			}
			if fault := f.Fault(); fault != "" {
				t.Errorf("%s: fault %q", what, fault)
			}
		}
		f.Announce(a.announcement())
		want("from the start", "orders", "stock", "web")
		asked := a.requests()
		time.Sleep(10 * trimEvery)
		if want("with all of them there", "orders", "stock", "web"); a.requests() != asked {
			t.Errorf("asked %d times for nothing", a.requests()-asked)
		}
		a.leaves("stock")
		time.Sleep(trimEvery)
		want("stock has left", "orders", "web")

		a.goesAway(true)
		a.leaves("web")
		time.Sleep(10 * trimEvery)
		want("the CA is away", "orders", "web")
		a.goesAway(false)
		time.Sleep(trimEvery)
		want("the CA is back", "orders")
		if seen := f.Seen(); f.Generation() != 1 || seen != 1 {
			t.Errorf("generation %d, seen %d", f.Generation(), seen)
		}
		end()
	})
}

// The entry of a service can come while the first bundle of the node is on its way,
// which is not for it.
func TestServiceThatComesMeanwhileGetsItsGrants(t *testing.T) {
	a := newAuthority(t, "orders", "web")
	a.leaves("web")
	dir, err := datadir.Open(filepath.Join(t.TempDir(), "data"), "shop.test", seal.Source{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		f, end := a.feed(t, dir)
		a.answered = sync.OnceFunc(func() {
			a.comes("web")
			f.Need("spiffe://shop.test/web")
		})
		f.Announce(a.announcement())
		synctest.Wait()
		if now := f.Now(); now.Active == nil || !now.Active.For("spiffe://shop.test/web") || now.Candidate == nil || !now.Candidate.For("spiffe://shop.test/web") {
			t.Errorf("after %d requests %+v is in use; want it to be for web", a.requests(), now)
		}
		end()
	})
}

// feed is one of the node, which runs until end is called.
func (a *authority) feed(t *testing.T, dir *datadir.Dir) (f *Feed, end func()) {
	t.Helper()
	f, err := New(t.Context(), Config{
		Name: "main", TrustDomain: "shop.test", DataDir: dir, Destinations: a.known, Heard: time.Now, StaleAfter: time.Hour, MaxAge: time.Hour,
		URLs: func(candidate bool) []string {
			if candidate {
				return []string{"https://ca/v1/policy/candidates/main"}
			}
			return []string{"https://ca/v1/policy/bundles/main"}
		},
		HTTP: &http.Client{Transport: a}, OnChange: func() {}, Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	return f, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

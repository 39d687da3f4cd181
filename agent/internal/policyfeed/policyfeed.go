// Package policyfeed keeps the node's active policy: it fetches the policy
// bundle that the CA announces, verifies and compiles it, and puts it in the
// place of the one before in one step. Whatever is wrong with a bundle, the
// last good one stays. The highest generation ever active is kept on disk and
// nothing older is taken again (SECURITY.md T27).
package policyfeed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/agent/internal/datadir"
	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/policy/engine"
)

const (
	// fetchTimeout bounds one fetch from one replica.
	fetchTimeout = 30 * time.Second
	firstRetry   = 200 * time.Millisecond
	lastRetry    = 30 * time.Second
)

// Config is what a Feed needs. All fields are required.
type Config struct {
	// Name is the bundle to follow, and TrustDomain that for which it must be
	// signed.
	Name, TrustDomain string
	// URLs returns where its bytes are, at the replica to be asked first in
	// front; at least one.
	URLs func() []string
	// HTTP speaks to the CA and to nobody else.
	HTTP *http.Client
	// DataDir is where the last good bundle is kept.
	DataDir *datadir.Dir
	// OnChange is called after the active policy changed.
	OnChange   func()
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Feed is safe for concurrent use. Use New, then Run.
type Feed struct {
	cfg       Config
	active    atomic.Pointer[engine.Engine]
	announced chan struct{}
	loads     *prometheus.CounterVec

	mu sync.Mutex
	// guarded by mu
	want    uint64       // the newest generation announced
	keys    []bundle.Key // that may sign
	changed chan struct{}

	past past

	highest atomic.Uint64 // generation that was active, ever
	etag    string        // of the goroutine that loads: New, then Run
}

// New takes up the bundle that an earlier run left on disk, so that a restart
// with the CA away has a policy.
func New(ctx context.Context, cfg Config) (*Feed, error) {
	f := &Feed{
		cfg: cfg, announced: make(chan struct{}, 1), changed: make(chan struct{}),
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_agent_policy_loads_total", Help: "Policy bundles fetched, by result (ok, unchanged, error).",
		}, []string{"result"}),
	}
	cfg.Registerer.MustRegister(f.loads, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "merlon_agent_policy_generation", Help: "Generation of the active policy bundle; 0 for none.",
	}, func() float64 { return float64(f.Generation()) }))
	if err := f.restore(ctx); err != nil {
		return nil, err
	}
	return f, nil
}

// Active returns the policy that decides now; nil for none.
func (f *Feed) Active() *engine.Engine { return f.active.Load() }

// Generation is that of the active policy; 0 for none.
func (f *Feed) Generation() uint64 {
	if e := f.active.Load(); e != nil {
		return e.Generation()
	}
	return 0
}

// Seen is the highest generation that was ever active, also before a restart.
func (f *Feed) Seen() uint64 { return f.highest.Load() }

// Changed returns a channel that is closed at the next change of the active
// policy.
func (f *Feed) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Announce takes note of the bundle that the CA wants active. It does not
// block.
func (f *Feed) Announce(pb *capb.PolicyBundle) {
	ctx := context.Background()
	if pb.GetName() != f.cfg.Name {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelDebug, "policy bundle of another name announced", slog.String("name", pb.GetName()))
		return
	}
	keys, err := parseKeys(pb.GetKeys())
	if err != nil {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelError, "announcement of a policy bundle refused", slog.Any("err", err))
		return
	}
	f.mu.Lock()
	f.want, f.keys = pb.GetGeneration(), keys
	f.mu.Unlock()
	select {
	case f.announced <- struct{}{}:
	default:
	}
}

// Run loads what is announced until ctx ends.
func (f *Feed) Run(ctx context.Context) error {
	defer f.cfg.HTTP.CloseIdleConnections()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.announced:
		}
		f.catchUp(ctx)
	}
}

// catchUp tries until the announced generation is active, or another is
// announced.
func (f *Feed) catchUp(ctx context.Context) {
	for failures := 0; ; failures++ {
		err := f.load(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		f.loads.WithLabelValues("error").Inc()
		wait := min(firstRetry<<min(failures, 10), lastRetry)
		wait = wait/2 + time.Duration(rand.Int64N(int64(wait))) //nolint:gosec // jitter
		f.cfg.Logger.LogAttrs(ctx, slog.LevelError, "policy bundle not loaded; the last good one stays",
			slog.String("name", f.cfg.Name), slog.Uint64("policy_revision", f.Generation()),
			slog.Duration("retry_in", wait), slog.Any("err", err))
		again := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			again.Stop()
			return
		case <-f.announced:
			again.Stop()
			failures = -1
		case <-again.C:
		}
	}
}

// load fetches and activates the bundle, unless the announced generation is
// active.
func (f *Feed) load(ctx context.Context) error {
	f.mu.Lock()
	want, keys := f.want, f.keys
	f.mu.Unlock()
	switch {
	case want == 0 || want == f.Generation():
		return nil
	case want < f.Seen():
		return fmt.Errorf("generation %d is announced, but generation %d was active before: the CA's store was set back, or somebody replays an old policy", want, f.Seen())
	}
	var failed []error
	for _, url := range f.cfg.URLs() {
		err := f.loadFrom(ctx, url, want, keys)
		if err == nil {
			return nil
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

// loadFrom fetches and activates the bundle of one replica, which may not have
// the announced generation yet.
func (f *Feed) loadFrom(ctx context.Context, url string, want uint64, keys []bundle.Key) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	raw, etag, err := bundle.Fetch(ctx, f.cfg.HTTP, url, f.etag)
	if errors.Is(err, bundle.ErrNotModified) {
		return fmt.Errorf("generation %d is announced, but the CA still serves %d at %s", want, f.Generation(), url)
	}
	if err != nil {
		return fmt.Errorf("fetch policy bundle %s: %w", f.cfg.Name, err)
	}
	if err := f.activate(ctx, raw, keys, true); err != nil {
		return err
	}
	f.etag = etag
	if got := f.Generation(); got < want {
		return fmt.Errorf("generation %d is announced, but the CA still serves %d at %s", want, got, url)
	}
	f.loads.WithLabelValues("ok").Inc()
	return nil
}

// activate verifies, compiles, keeps and swaps, in that order.
func (f *Feed) activate(ctx context.Context, raw []byte, keys []bundle.Key, keep bool) error {
	compiled, generation, err := f.compile(ctx, raw, keys, f.Seen())
	if err != nil {
		return err
	}
	if keep {
		// Before it decides anything: a generation that was active once must
		// not be forgotten.
		if err := f.save(raw, generation, keys); err != nil {
			return err
		}
	}
	f.highest.Store(generation)
	f.past.keep(pastBundle{generation, raw, keys})
	f.active.Store(compiled)
	f.mu.Lock()
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
	f.cfg.OnChange()
	f.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "policy active",
		slog.String("name", f.cfg.Name), slog.Uint64("policy_revision", generation), slog.Int("grants", compiled.Grants()))
	return nil
}

// compile verifies a bundle that is not older than generation least.
func (f *Feed) compile(ctx context.Context, raw []byte, keys []bundle.Key, least uint64) (*engine.Engine, uint64, error) {
	contents, err := bundle.Verify(raw, keys, bundle.Expect{
		Name: f.cfg.Name, TrustDomain: f.cfg.TrustDomain, MinGeneration: least,
	})
	if err != nil {
		return nil, 0, fmt.Errorf("verify policy bundle %s: %w", f.cfg.Name, err)
	}
	md := contents.Metadata
	compiled, err := engine.New(ctx, engine.Source{
		Modules: contents.Modules, Grants: contents.Grants,
		Generation: md.Generation, NotAfter: md.NotAfter, Logger: f.cfg.Logger,
	})
	if err != nil {
		return nil, 0, fmt.Errorf("compile policy bundle %s generation %d: %w", f.cfg.Name, md.Generation, err)
	}
	return compiled, md.Generation, nil
}

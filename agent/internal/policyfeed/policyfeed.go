// Package policyfeed keeps the node's active policy: it fetches the policy
// bundle that the CA announces, verifies and compiles it, and puts it in the
// place of the one before in one step; so it does with the candidate that is tried
// beside it. Whatever is wrong with a bundle, the last good one stays. The highest
// generation ever active is kept on disk and nothing older is taken again
// (SECURITY.md T27).
package policyfeed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
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
	// trimEvery is how often it is looked whether the share in use has grants of
	// services that have left the node. A service that comes waits for its grants; one
	// that goes does not, so that many that go cost one fetch.
	trimEvery = time.Minute
)

// Config is what a Feed needs. All fields are required.
type Config struct {
	// Name is the bundle to follow, and TrustDomain that for which it must be
	// signed.
	Name, TrustDomain string
	// URLs returns where its bytes are, or those of its candidate, at the replica to
	// be asked first in front; at least one.
	URLs func(candidate bool) []string
	// Destinations are the SPIFFE IDs whose calls are decided here, each once. The CA sends
	// what concerns them. It is asked again when there are others (Need), and within a minute
	// when some are gone.
	Destinations func() []string
	// Heard is when the CA was heard last. StaleAfter that the agent warns, MaxAge
	// after it is too long ago; DenyStale is what happens to calls then, for the log.
	Heard              func() time.Time
	StaleAfter, MaxAge time.Duration
	DenyStale          bool
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
	now       atomic.Pointer[Snapshot]
	announced chan struct{}
	loads     *prometheus.CounterVec

	mu sync.Mutex
	// guarded by mu
	want    announcement // the newest
	changed chan struct{}
	fault   string // why what is wanted is not in use
	// behindSince is since when another generation is wanted than is in use; zero:
	// it is not.
	behindSince time.Time

	past past

	highest atomic.Uint64 // generation that was active, ever
	// Of the goroutine that loads: New, then Run.
	etag  string
	tried uint64 // highest generation of a candidate, ever
	// waits are what was wrong with the last load and mends itself, and since when; within
	// patience that is no fault, and asked for again.
	waits map[string]time.Time
}

// announcement is what the CA wants in use.
type announcement struct {
	generation uint64
	keys       []bundle.Key // that may sign
	candidate  uint64       // 0 for none
	rollout    rollout
	// destinations are those of the node when it is acted upon, each once.
	destinations []string
}

// serves says whether e is for all destinations that are wanted.
func (a *announcement) serves(e *engine.Engine) bool {
	return !slices.ContainsFunc(a.destinations, func(d string) bool { return !e.For(d) })
}

// exceeds says whether e is for a destination that is not wanted any more.
func (a *announcement) exceeds(e *engine.Engine) bool { return e != nil && e.ForOthers(a.destinations) }

// New takes up the bundle that an earlier run left on disk, so that a restart
// with the CA away has a policy.
func New(ctx context.Context, cfg Config) (*Feed, error) {
	f := &Feed{
		cfg: cfg, announced: make(chan struct{}, 1), changed: make(chan struct{}),
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_agent_policy_loads_total", Help: "Policy bundles fetched, by result (ok, unchanged, error).",
		}, []string{"result"}),
	}
	f.now.Store(&Snapshot{Version: uint64(time.Now().UnixNano())})
	cfg.Registerer.MustRegister(f.loads, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "merlon_agent_policy_generation", Help: "Generation of the active policy bundle; 0 for none.",
	}, func() float64 { return float64(f.Generation()) }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "merlon_agent_policy_candidate_generation", Help: "Generation of the policy candidate that is tried on this node; 0 for none.",
	}, func() float64 { return float64(generationOf(f.Now().Candidate)) }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "merlon_agent_policy_as_of_timestamp_seconds", Help: "Until when the policy in use is known to be the one in force; 0 for never.",
	}, func() float64 { return float64(max(f.AsOf().Unix(), 0)) }))
	if err := f.restore(ctx); err != nil {
		return nil, err
	}
	return f, nil
}

// Now returns what decides now.
func (f *Feed) Now() *Snapshot { return f.now.Load() }

// Active returns the active policy; nil for none.
func (f *Feed) Active() *engine.Engine { return f.Now().Active }

// Generation is that of the active policy; 0 for none.
func (f *Feed) Generation() uint64 { return generationOf(f.Now().Active) }

func generationOf(e *engine.Engine) uint64 {
	if e == nil {
		return 0
	}
	return e.Generation()
}

// Fault says why what the CA announces is not in use; empty: it is.
func (f *Feed) Fault() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.fault
}

// Seen is the highest generation that was ever active, also before a restart.
func (f *Feed) Seen() uint64 { return f.highest.Load() }

// Changed returns a channel that is closed when Now is another.
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
	f.want = announcement{generation: pb.GetGeneration(), keys: keys, candidate: pb.GetCandidate().GetGeneration(), rollout: rolloutOf(pb.GetCandidate())}
	f.noteBehind()
	f.mu.Unlock()
	f.wake()
}

// wake has Run load what is announced.
func (f *Feed) wake() {
	select {
	case f.announced <- struct{}{}:
	default:
	}
}

// Need takes note of a destination whose calls are decided here from now on. It does
// not block.
func (f *Feed) Need(destination string) {
	now := f.Now()
	if now.Active == nil || now.Active.For(destination) && (now.Candidate == nil || now.Candidate.For(destination)) {
		return
	}
	f.wake()
}

// Run loads what is announced until ctx ends.
func (f *Feed) Run(ctx context.Context) error {
	defer f.cfg.HTTP.CloseIdleConnections()
	var watching sync.WaitGroup
	watching.Go(func() { f.watchAge(ctx) })
	defer watching.Wait()
	trim := time.NewTicker(trimEvery)
	defer trim.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.announced:
			f.catchUp(ctx)
		case <-trim.C:
			f.trim(ctx)
		}
	}
}

// trim gives up the grants of services that have left the node. What is in use decides
// for all the others meanwhile, so that it cannot be had now is no fault.
func (f *Feed) trim(ctx context.Context) {
	now, want := f.Now(), f.wanted()
	if !want.exceeds(now.Active) && !want.exceeds(now.Candidate) {
		return
	}
	if err := f.load(ctx); err != nil {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelDebug, "grants of services that have left the node stay for now", slog.Any("err", err))
	}
	if len(f.waits) > 0 {
		f.wake()
	}
}

// wanted is what is announced, for the destinations of now.
func (f *Feed) wanted() announcement {
	f.mu.Lock()
	want := f.want
	f.mu.Unlock()
	want.destinations = f.cfg.Destinations()
	return want
}

// catchUp tries until what is announced is in use, or something else is
// announced.
func (f *Feed) catchUp(ctx context.Context) {
	for failures := 0; ; failures++ {
		err := f.load(ctx)
		f.setFault(err)
		if err == nil && len(f.waits) == 0 && f.outdated() { // a service has come while this was on its way
			continue
		}
		if err == nil && len(f.waits) == 0 || ctx.Err() != nil {
			return
		}
		if err == nil {
			failures = 0
		}
		wait := min(firstRetry<<min(failures, 10), lastRetry)
		wait = wait/2 + time.Duration(rand.Int64N(int64(wait))) //nolint:gosec // jitter
		if err != nil {
			f.loads.WithLabelValues("error").Inc()
			f.cfg.Logger.LogAttrs(ctx, slog.LevelError, "policy bundle not loaded; the last good one stays",
				slog.String("name", f.cfg.Name), slog.Uint64("policy_revision", f.Generation()),
				slog.Duration("retry_in", wait), slog.Any("err", err))
		}
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

// outdated says whether what is in use lacks a service that is on the node by now.
func (f *Feed) outdated() bool {
	now, want := f.Now(), f.wanted()
	return now.Active != nil && !want.serves(now.Active) || now.Candidate != nil && !want.serves(now.Candidate)
}

func (f *Feed) setFault(err error) {
	fault := ""
	if err != nil {
		fault = err.Error()
	}
	f.mu.Lock()
	changed := f.fault != fault
	f.fault = fault
	f.mu.Unlock()
	if changed {
		f.cfg.OnChange()
	}
}

// draft is what is about to be in use, with the bytes of it that are to be kept.
type draft struct {
	Snapshot
	raw, rawCandidate []byte // nil: as before
	etag              string
}

// load puts what is announced into use, as far as it is not. The active policy and
// its candidate are swapped in one step; a candidate that is not announced any more
// goes, and one that is at fault is left out, whatever becomes of the other.
func (f *Feed) load(ctx context.Context) error {
	want := f.wanted()
	if want.generation == 0 {
		return f.faults()
	}
	before := f.Now()
	d := draft{Snapshot: Snapshot{Active: before.Active}, etag: f.etag}
	activeErr := f.loadActive(ctx, &d, want)
	candidateErr := f.loadCandidate(ctx, &d, before, want)
	if d.Active == before.Active && d.Candidate == before.Candidate && sameRollout(d.rollout, before.rollout) {
		return f.faults(activeErr, candidateErr)
	}
	return f.faults(activeErr, candidateErr, f.use(ctx, &d, want.keys, true))
}

// loadActive fetches the announced generation, unless it is active.
func (f *Feed) loadActive(ctx context.Context, d *draft, want announcement) error {
	if want.generation == f.Generation() && want.serves(d.Active) && !want.exceeds(d.Active) {
		return nil
	}
	err := f.eachURL(false, func(url string) error { return f.loadFrom(ctx, url, d, want) })
	switch {
	case err == nil:
		f.loads.WithLabelValues("ok").Inc()
	case want.generation < f.Seen() && errors.Is(err, bundle.ErrOlder):
		return &olderError{want.generation, f.Seen(), err}
	}
	return err
}

// eachURL tries one replica after the other. Where one has served what is wanted, only
// not for every destination, what was wrong with the others does not matter.
func (f *Feed) eachURL(candidate bool, try func(url string) error) error {
	var failed []error
	for _, url := range f.cfg.URLs(candidate) {
		err := try(url)
		if err == nil {
			return nil
		}
		failed = append(failed, err)
	}
	for _, err := range failed {
		if lacking, ok := errors.AsType[*lackingError](err); ok {
			return lacking
		}
	}
	return errors.Join(failed...)
}

// loadFrom fetches the bundle of one replica, which may not have the announced
// generation yet; a newer one than that in use is taken all the same.
func (f *Feed) loadFrom(ctx context.Context, url string, d *draft, want announcement) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	raw, etag, err := bundle.Fetch(ctx, f.cfg.HTTP, url, d.etag)
	if errors.Is(err, bundle.ErrNotModified) && want.generation <= generationOf(d.Active) { // the announcement may be late
		return f.covers(&want, d.Active)
	}
	if errors.Is(err, bundle.ErrNotModified) {
		return fmt.Errorf("generation %d is announced, but the CA still serves %d at %s", want.generation, generationOf(d.Active), url)
	}
	if err != nil {
		return fmt.Errorf("fetch policy bundle %s: %w", f.cfg.Name, err)
	}
	e, err := f.compile(ctx, raw, want.keys, bundle.Expect{MinGeneration: max(f.Seen(), generationOf(d.Active))})
	if err != nil {
		return err
	}
	d.Active, d.raw, d.etag = e, raw, etag
	if got := e.Generation(); got < want.generation {
		return fmt.Errorf("generation %d is announced, but the CA still serves %d at %s", want.generation, got, url)
	}
	return f.covers(&want, e)
}

// loadCandidate fetches the announced candidate, unless it is in use.
func (f *Feed) loadCandidate(ctx context.Context, d *draft, before *Snapshot, want announcement) error {
	switch {
	case want.candidate == 0:
		return nil
	case want.candidate <= generationOf(d.Active):
		return fmt.Errorf("candidate %d is announced, which is not newer than generation %d", want.candidate, generationOf(d.Active))
	case want.candidate == generationOf(before.Candidate) && want.serves(before.Candidate):
		d.Candidate, d.rollout, d.Step = before.Candidate, want.rollout, want.rollout.Step
		if !want.exceeds(before.Candidate) {
			return nil
		}
	}
	err := f.eachURL(true, func(url string) error {
		ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
		defer cancel()
		raw, _, err := bundle.Fetch(ctx, f.cfg.HTTP, url, "")
		if err != nil {
			return fmt.Errorf("fetch the candidate of policy bundle %s: %w", f.cfg.Name, err)
		}
		e, err := f.compile(ctx, raw, want.keys, bundle.Expect{MinGeneration: max(f.tried, generationOf(d.Active)+1), Candidate: true})
		if err != nil {
			return err
		}
		if e.Generation() != want.candidate {
			return fmt.Errorf("candidate %d is announced, but the CA serves %d at %s", want.candidate, e.Generation(), url)
		}
		d.Candidate, d.rawCandidate, d.rollout, d.Step = e, raw, want.rollout, want.rollout.Step
		return f.covers(&want, e)
	})
	if err != nil {
		return fmt.Errorf("the policy candidate is left out: %w", err)
	}
	return nil
}

// compile verifies a bundle and makes a policy of it, of one that is as want says.
func (f *Feed) compile(ctx context.Context, raw []byte, keys []bundle.Key, want bundle.Expect) (*engine.Engine, error) {
	want.Name, want.TrustDomain = f.cfg.Name, f.cfg.TrustDomain
	contents, err := bundle.Verify(raw, keys, want)
	if err != nil {
		return nil, fmt.Errorf("verify policy bundle %s: %w", f.cfg.Name, err)
	}
	md := contents.Metadata
	e, err := engine.New(ctx, engine.Source{
		Modules: contents.Modules, Grants: contents.Grants, Audience: md.Audience,
		Generation: md.Generation, NotAfter: md.NotAfter, Logger: f.cfg.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("compile policy bundle %s generation %d: %w", f.cfg.Name, md.Generation, err)
	}
	return e, nil
}

// use keeps d on disk, where that is asked, and swaps it in.
func (f *Feed) use(ctx context.Context, d *draft, keys []bundle.Key, keep bool) error {
	before := f.Now()
	if keep {
		// Before it decides anything: a generation that was in use once must not be
		// forgotten.
		if err := f.save(d, keys); err != nil {
			return err
		}
	}
	f.highest.Store(max(f.Seen(), generationOf(d.Active)))
	f.tried = max(f.tried, generationOf(d.Candidate))
	f.etag = d.etag
	next := d.Snapshot
	next.Version, next.Since = before.Version+1, time.Now()
	f.now.Store(&next)
	if next.Active != before.Active {
		f.past.keep(pastBundle{f.Generation(), d.raw, keys, false})
	}
	if next.Candidate != nil && next.Candidate != before.Candidate {
		f.past.keep(pastBundle{next.Candidate.Generation(), d.rawCandidate, keys, true})
	}
	f.mu.Lock()
	f.noteBehind()
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
	f.cfg.OnChange()
	if next.Active != before.Active && f.Generation() == generationOf(before.Active) {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelDebug, "policy for other destinations",
			slog.String("name", f.cfg.Name), slog.Uint64("policy_revision", f.Generation()), slog.Int("grants", next.Active.Grants()))
	} else if next.Active != before.Active {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "policy active",
			slog.String("name", f.cfg.Name), slog.Uint64("policy_revision", f.Generation()), slog.Int("grants", next.Active.Grants()))
	}
	if next.Candidate != before.Candidate || !sameRollout(next.rollout, before.rollout) {
		f.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "policy candidate", slog.String("name", f.cfg.Name),
			slog.Uint64("candidate_revision", generationOf(next.Candidate)),
			slog.Any("canary_destinations", next.rollout.Destinations), slog.Uint64("canary_per_mille", uint64(next.rollout.PerMille)))
	}
	return nil
}

func sameRollout(a, b rollout) bool {
	return a.Step == b.Step && a.PerMille == b.PerMille && slices.Equal(a.Destinations, b.Destinations)
}

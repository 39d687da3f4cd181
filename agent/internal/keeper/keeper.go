// Package keeper writes down what the node serves, so that an agent which was
// restarted while the CA is away serves it again, and reads it back. A change
// waits for the disk nowhere: the whole picture is written by a goroutine of
// its own, a moment after it changed, and then not again before fifty times as
// long has passed as it took, so that writing takes two hundredths of the time
// at most, however much there is and however often it changes. An agent that
// is killed forgets the last moment.
package keeper

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/datadir"
	"merlon.dev/sdk/seal"
)

const (
	// file is a cache.Snapshot.
	file = "cache"
	// settle is how long changes gather, minPause how long it is at least from
	// one write to the next, maxPause at most.
	settle   = 100 * time.Millisecond
	minPause = 250 * time.Millisecond
	maxPause = 30 * time.Second
	share    = 50
	// retryPause follows a write that failed.
	retryPause = 5 * time.Second
)

// Config is what a Keeper needs. All fields are required.
type Config struct {
	Dir   *datadir.Dir
	Cache *cache.Cache
	// TrustDomain and AgentID are whose picture it is; AgentID returns "" while
	// it is not known.
	TrustDomain string
	AgentID     func() string
	// Secrets lets X509-SVIDs with their keys and JWT-SVIDs go to the disk.
	Secrets    bool
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Keeper is safe for concurrent use. Use New, then Load, then Run.
type Keeper struct {
	cfg      Config
	revision atomic.Uint64
	savedAt  atomic.Pointer[time.Time]
	failed   atomic.Pointer[error]
	writes   *prometheus.CounterVec
}

// New returns a Keeper.
func New(cfg Config) *Keeper {
	k := &Keeper{cfg: cfg, writes: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "merlon_agent_cache_writes_total", Help: "Times that what the node serves was written to the disk, by result (ok, error).",
	}, []string{"result"})}
	cfg.Registerer.MustRegister(k.writes)
	return k
}

// Revision is the store revision of what is on the disk; 0 for nothing.
func (k *Keeper) Revision() uint64 { return k.revision.Load() }

// State says when the picture was last written, and what is wrong with that;
// zero and nil before the first time.
func (k *Keeper) State() (at time.Time, err error) {
	if t := k.savedAt.Load(); t != nil {
		at = *t
	}
	if e := k.failed.Load(); e != nil {
		err = *e
	}
	return at, err
}

// Load takes up what an earlier run wrote. Whatever is wrong with it, it is set
// aside, and the CA's picture is awaited; only a disk that fails is an error.
func (k *Keeper) Load(ctx context.Context) error {
	content, err := k.cfg.Dir.Read(ctx, file)
	if errors.Is(err, seal.ErrWrongKey) {
		return k.cfg.Dir.SetAside(ctx, file, err)
	}
	if err != nil || content == nil {
		return err
	}
	s, err := cache.ParseSnapshot(content, k.cfg.TrustDomain)
	if err == nil {
		if id := k.cfg.AgentID(); id != "" && s.AgentID != "" && s.AgentID != id {
			err = errors.New("take up the cache: it is of " + s.AgentID + ", and this is " + id)
		}
	}
	if err == nil && !k.cfg.Secrets {
		if err := k.withoutSecrets(s); err != nil {
			return err
		}
	}
	if err == nil {
		err = k.cfg.Cache.Restore(ctx, s)
	}
	if err != nil {
		return k.cfg.Dir.SetAside(ctx, file, err)
	}
	k.revision.Store(s.Revision)
	k.savedAt.Store(&s.SavedAt)
	k.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "cache taken up: what it holds is served until the CA is there",
		slog.Int("entries", len(s.Entries)), slog.Int("x509_svids", len(s.SVIDs)), slog.Int("jwt_svids", len(s.JWTs)),
		slog.Time("saved_at", s.SavedAt), slog.Time("heard", s.Heard))
	return nil
}

// withoutSecrets takes out of s, and off the disk, what an agent left that was
// allowed to write it. That is not for the next change: without the CA there may be
// none.
func (k *Keeper) withoutSecrets(s *cache.Snapshot) error {
	if len(s.SVIDs)+len(s.JWTs) == 0 {
		return nil
	}
	s.SVIDs, s.JWTs = nil, nil
	content, err := s.Marshal()
	if err != nil {
		return err
	}
	return k.cfg.Dir.Write(file, content)
}

// Run writes until ctx ends, and then once more.
func (k *Keeper) Run(ctx context.Context) error {
	dirty := false
	defer func() {
		select {
		case <-k.cfg.Cache.Changed():
			dirty = true
		default:
		}
		if dirty {
			k.save(context.WithoutCancel(ctx))
		}
	}()
	for {
		if !dirty {
			select {
			case <-ctx.Done():
				return nil
			case <-k.cfg.Cache.Changed():
				dirty = true
			}
		}
		if !rest(ctx, settle) {
			return nil
		}
		began := time.Now()
		dirty = !k.save(ctx)
		pause := min(max(share*time.Since(began), minPause), maxPause)
		if dirty {
			pause = max(pause, retryPause)
		}
		if !rest(ctx, pause) {
			return nil
		}
	}
}

func rest(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// save writes the picture, and says whether the disk has it now.
func (k *Keeper) save(ctx context.Context) bool {
	s := k.cfg.Cache.Snapshot(k.cfg.AgentID(), k.cfg.Secrets)
	if s == nil {
		return true
	}
	content, err := s.Marshal()
	if err == nil {
		err = k.cfg.Dir.Write(file, content)
	}
	before := k.failed.Swap(&err)
	if err != nil {
		k.writes.WithLabelValues("error").Inc()
		if before == nil || *before == nil {
			k.cfg.Logger.LogAttrs(ctx, slog.LevelError, "cache not written: after a restart without the CA the node would lack what changed",
				slog.Any("err", err))
		}
		return false
	}
	k.writes.WithLabelValues("ok").Inc()
	k.revision.Store(s.Revision)
	k.savedAt.Store(&s.SavedAt)
	return true
}

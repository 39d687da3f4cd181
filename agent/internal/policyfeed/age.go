// How old the policy in use may be: its age counts from the CA's last word that it is
// the one in force (SECURITY.md T28).

package policyfeed

import (
	"context"
	"log/slog"
	"time"
)

// lookEvery is how often the age is looked at.
const lookEvery = 5 * time.Second

// AsOf is until when the policy in use is known to be the one in force: when the CA
// was heard last, unless it has announced another one that cannot be loaded; zero
// for never.
func (f *Feed) AsOf() time.Time {
	heard := f.cfg.Heard()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.behindSince.IsZero() && f.behindSince.Before(heard) {
		return f.behindSince
	}
	return heard
}

// noteBehind notes since when another generation is announced than is in use.
// f.mu is held.
func (f *Feed) noteBehind() {
	switch {
	case f.want.generation == f.Generation():
		f.behindSince = time.Time{}
	case f.behindSince.IsZero():
		f.behindSince = time.Now()
	}
}

// stage is how old the policy in use is.
type stage int

const (
	fresh  stage = iota
	stale        // the operator is warned
	tooOld       // what is configured happens to calls
)

func (f *Feed) stageAt(now time.Time) stage {
	switch age := now.Sub(f.AsOf()); {
	case f.Generation() == 0: // every call is denied NO_BUNDLE
		return fresh
	case age > f.cfg.MaxAge:
		return tooOld
	case age > f.cfg.StaleAfter:
		return stale
	}
	return fresh
}

// watchAge says in the log when the policy in use becomes stale, and when it is fresh
// again.
func (f *Feed) watchAge(ctx context.Context) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for last := fresh; ; {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		now := f.stageAt(time.Now())
		if now == last {
			continue
		}
		last = now
		attrs := []slog.Attr{slog.String("name", f.cfg.Name), slog.Uint64("policy_revision", f.Generation()), slog.Time("as_of", f.AsOf())}
		switch now {
		case fresh:
			f.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "policy is known to be in force again", attrs...)
		case stale:
			f.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "policy is stale: the CA has not said for long that it is the one in force",
				append(attrs, slog.Duration("too_old_after", f.cfg.MaxAge), slog.Bool("then_denies", f.cfg.DenyStale))...)
		case tooOld:
			f.cfg.Logger.LogAttrs(ctx, slog.LevelError, "policy is too old", append(attrs, slog.Bool("denies", f.cfg.DenyStale))...)
		}
	}
}

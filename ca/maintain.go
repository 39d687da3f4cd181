// What the CA does without being asked: renews its intermediate and the
// signatures of policy bundles, removes what has expired, and keeps in mind
// whether it could issue.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/store"
)

const (
	upkeepInterval = time.Minute
	probeInterval  = 5 * time.Second
	probeTimeout   = 5 * time.Second
	// choreTimeout keeps a store that hangs from holding up the probe, which
	// is what notices.
	choreTimeout = 30 * time.Second
)

// maintain runs until ctx ends.
func (p *parts) maintain(ctx context.Context) error {
	var storeState atomic.Pointer[error]
	p.health.Check("store", func() error {
		if err := storeState.Load(); err != nil {
			return *err
		}
		return nil
	})
	p.health.Check("authority", func() error { return p.checkAuthority(time.Now()) })
	p.health.Check("audit", p.service.AuditFault)
	probe, upkeep := time.NewTicker(probeInterval), time.NewTicker(upkeepInterval)
	defer probe.Stop()
	defer upkeep.Stop()
	p.upkeep(ctx, time.Now())
	for {
		err := p.probeStore(ctx)
		storeState.Store(&err)
		select {
		case <-ctx.Done():
			return nil
		case <-probe.C:
		case now := <-upkeep.C:
			p.upkeep(ctx, now)
		}
	}
}

// probeStore asks the committer for an empty transaction, which writes nothing
// and fails like a write would.
func (p *parts) probeStore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if _, err := p.store.Txn(ctx, nil, nil, nil); err != nil {
		return fmt.Errorf("the store takes no writes: %w", err)
	}
	return nil
}

// checkAuthority says why the CA could not issue.
func (p *parts) checkAuthority(now time.Time) error {
	ca := p.keys.X509()
	if ca == nil {
		return errors.New("no X.509 authority")
	}
	if !now.Before(ca.NotAfter()) {
		return fmt.Errorf("the issuing chain ended at %s", ca.NotAfter().Format(time.RFC3339))
	}
	if p.registry.Trust() == nil {
		return errors.New("no trust bundle is published")
	}
	return nil
}

// upkeep does each chore; one that fails comes again a minute later.
func (p *parts) upkeep(ctx context.Context, now time.Time) {
	for name, chore := range map[string]func(context.Context, time.Time) error{
		"renew the intermediate": p.renewIntermediate,
		"remove expired entries": p.removeEntries,
		"remove old revocations": p.removeRevocations,
		"remove expired tokens":  p.removeTokens,
		"renew policy bundles":   p.renewPolicies,
		"remove stray policies":  p.releases.Prune,
	} {
		bounded, cancel := context.WithTimeout(ctx, choreTimeout)
		err := chore(bounded, now)
		cancel()
		if err != nil && ctx.Err() == nil {
			level := slog.LevelError
			if errors.Is(err, store.ErrReadOnly) || errors.Is(err, store.ErrUnavailable) {
				level = slog.LevelDebug // /ready says so, and the chore comes again
			}
			p.log.LogAttrs(ctx, level, "upkeep failed", slog.String("chore", name), slog.Any("err", err))
		}
	}
}

func (p *parts) renewIntermediate(ctx context.Context, now time.Time) error {
	renewed, err := p.keys.RenewIntermediate(ctx, now)
	if !renewed {
		return err
	}
	ca := p.keys.X509()
	return errors.Join(err, p.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Renew, Actor: "ca", Detail: "intermediate", AuthorityID: ca.ID(), NotAfter: ca.Chain[0].NotAfter,
	}))
}

// renewPolicies keeps policies from ending because nobody changes them.
func (p *parts) renewPolicies(ctx context.Context, now time.Time) error {
	renewed, err := p.releases.Renew(ctx, now)
	return p.recordRenewed(ctx, now, renewed, err)
}

// enterEpoch lets agents take the policy of a store that was restored. A bundle
// that cannot be signed again is no reason not to serve: upkeep comes by it
// again, and a push helps.
func (p *parts) enterEpoch(ctx context.Context, now time.Time) {
	renewed, err := p.releases.EnterEpoch(ctx, now)
	if err := p.recordRenewed(ctx, now, renewed, err); err != nil {
		p.log.LogAttrs(ctx, slog.LevelError, "policy bundles not renewed after a restore", slog.Any("err", err))
	}
}

// recordRenewed takes over what Renew returns.
func (p *parts) recordRenewed(ctx context.Context, now time.Time, renewed []*release.Head, err error) error {
	errs := []error{err}
	for _, h := range renewed {
		errs = append(errs, p.audit.Append(ctx, audit.Record{
			Time: now, Type: audit.Renew, Actor: "ca", NotAfter: h.NotAfter,
			Detail: fmt.Sprintf("policy bundle %s, generation %d", h.Name, h.Generation),
		}))
	}
	return errors.Join(errs...)
}

// removeEntries needs no revocations: no SVID outlives its entry.
func (p *parts) removeEntries(ctx context.Context, now time.Time) error {
	for _, e := range p.registry.ExpiredEntries(now) {
		if err := p.removeEntry(ctx, now, e); err != nil {
			return err
		}
	}
	return nil
}

func (p *parts) removeEntry(ctx context.Context, now time.Time, e *entry.Entry) error {
	key := registry.EntryPrefix + e.ID
	res, err := p.store.Txn(ctx, []store.Cmp{{Key: key, ModRevision: e.Revision}}, []store.Op{store.Delete(key)}, nil)
	if err != nil || !res.Succeeded { // an operator was faster
		return err
	}
	return p.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Admin, Actor: "ca", Detail: "entry expired", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String(),
	})
}

func (p *parts) removeRevocations(ctx context.Context, now time.Time) error {
	return p.remove(ctx, p.registry.ExpiredRevocations(now))
}

func (p *parts) removeTokens(ctx context.Context, now time.Time) error {
	var expired []string
	for after, more := "", true; more; {
		var kvs []store.KV
		var err error
		kvs, _, more, err = p.store.List(ctx, attest.TokenPrefix, after, 1000, 0)
		if err != nil {
			return err
		}
		for _, kv := range kvs {
			if attest.TokenExpired(kv, now) {
				expired = append(expired, kv.Key)
			}
			after = kv.Key
		}
	}
	return p.remove(ctx, expired)
}

// remove deletes keys, as many to a transaction as fit.
func (p *parts) remove(ctx context.Context, keys []string) error {
	for len(keys) > 0 {
		n := min(len(keys), store.MaxTxnOps)
		ops := make([]store.Op, n)
		for i, key := range keys[:n] {
			ops[i] = store.Delete(key)
		}
		if _, err := p.store.Txn(ctx, nil, ops, nil); err != nil {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

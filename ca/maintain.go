// What the CA does without being asked: renews its intermediate and the
// signatures of policy bundles, removes what has expired, and keeps in mind
// whether it could issue. Each replica looks after itself; what concerns all is
// done by one of them, the leader.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
)

const (
	upkeepInterval = time.Minute
	// A replica that is cut off from its store says so within probeInterval and
	// probeTimeout.
	probeInterval = 2 * time.Second
	probeTimeout  = 3 * time.Second
	choreTimeout  = 30 * time.Second
	// Chores that are done once for all replicas: a leader that is gone is
	// replaced after store.CampaignTTL.
	upkeepLeader  = "upkeep"
	leaderRetry   = 5 * time.Second
	resignTimeout = time.Second
)

// checkReadiness says what the CA needs to be ready. It comes before anybody can
// ask: without a check a server is ready.
func (p *parts) checkReadiness() {
	p.health.Check("store", func() error {
		if err := p.storeFault.Load(); err != nil {
			return *err
		}
		return nil
	})
	p.health.Check("picture", p.registry.Fault)
	p.health.Check("authority", func() error { return p.checkAuthority(time.Now()) })
	p.health.Check("audit", p.service.AuditFault)
	p.health.Check("keys", p.service.KeyFault)
	p.health.Check("replica", p.service.Standing)
	p.health.Check("upstream", p.keys.UpstreamFault)
}

// watchStore keeps in mind whether the store can be reached and written, until
// ctx ends, and tells the agents.
func (p *parts) watchStore(ctx context.Context) error {
	probe := time.NewTicker(probeInterval)
	defer probe.Stop()
	evicted := false
	for {
		if err := p.service.Standing(); err != nil && !evicted {
			evicted = true
			p.log.LogAttrs(ctx, slog.LevelError, "evicted", slog.Any("err", err))
		}
		err := p.probeStore(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, store.ErrReplaced) {
			return err // what is in memory is of another store
		}
		p.storeFault.Store(&err)
		p.service.SetStale(unreachable(err) || p.registry.Fault() != nil)
		select {
		case <-ctx.Done():
			return nil
		case <-probe.C:
		}
	}
}

// unreachable tells a store that is away from one that refuses.
func unreachable(err error) bool {
	return errors.Is(err, store.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded)
}

// probeStore asks the committer for an empty transaction, which writes nothing
// and fails like a write would.
func (p *parts) probeStore(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	_, err := p.store.Txn(ctx, nil, nil, nil)
	switch {
	case unreachable(err):
		return fmt.Errorf("the store cannot be reached, so this CA refuses changes and issues from what it knew last: %w", err)
	case err != nil:
		return fmt.Errorf("the store takes no writes: %w", err)
	}
	return nil
}

// errNotLeading ends the chores of one who has led.
var errNotLeading = errors.New("another replica leads now")

// maintain does this replica's own chores until ctx ends.
func (p *parts) maintain(ctx context.Context) error {
	for {
		p.upkeep(ctx, time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(upkeepEvery(p.intermediateTTL, p.keys.X509())):
		}
	}
}

// upkeepEvery is often enough to renew ca's intermediate at half of its life: ttl is
// what this CA asks for, and the CA that signed it may have given less. The life of
// the certificate alone is too long by what its begin was set back.
func upkeepEvery(ttl time.Duration, ca *authority.X509Authority) time.Duration {
	life := ttl
	if ca != nil {
		life = min(life, ca.Chain[0].NotAfter.Sub(ca.Chain[0].NotBefore))
	}
	return min(upkeepInterval, max(life/8, minTick))
}

// lead does the chores of all replicas whenever this one leads, until ctx ends.
func (p *parts) lead(ctx context.Context) error {
	for ctx.Err() == nil && p.service.Standing() == nil {
		l, err := p.store.Campaign(ctx, upkeepLeader, store.CampaignTTL)
		if err == nil {
			p.leadUntilLost(ctx, l)
			continue
		}
		if ctx.Err() != nil || errors.Is(err, store.ErrClosed) {
			return nil
		}
		p.log.LogAttrs(ctx, slog.LevelWarn, "upkeep not led", slog.Any("err", err))
		select {
		case <-ctx.Done():
		case <-time.After(leaderRetry):
		}
	}
	return nil
}

func (p *parts) leadUntilLost(ctx context.Context, l store.Leadership) {
	upkeep := time.NewTicker(upkeepInterval)
	defer upkeep.Stop()
	leading, stop := context.WithCancel(ctx)
	var follower sync.WaitGroup
	follower.Go(func() { p.service.FollowFederations(leading) })
	defer follower.Wait()
	defer stop()
	for now := time.Now(); p.service.Standing() == nil && p.holds(ctx, l.Fence()); {
		p.chores(ctx, now, l)
		select {
		case <-l.Lost():
			return
		case <-ctx.Done():
		case now = <-upkeep.C:
			continue
		}
		break
	}
	resigning, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
	defer cancel()
	if err := l.Resign(resigning); err != nil {
		p.log.LogAttrs(ctx, slog.LevelWarn, "upkeep not handed over", slog.Any("err", err))
	}
}

// holds says whether a fence does, as far as that can be known: its key may have
// been removed behind our back, and then nobody leads until somebody campaigns.
func (p *parts) holds(ctx context.Context, fence store.Cmp) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	res, err := p.store.Txn(ctx, []store.Cmp{fence}, nil, nil)
	return err != nil || res.Succeeded
}

// checkAuthority says why the CA could not issue.
func (p *parts) checkAuthority(now time.Time) error {
	ca := p.keys.X509()
	if ca == nil {
		return errors.New("no X.509 authority")
	}
	end := ca.NotAfter()
	if !now.Before(end) {
		return fmt.Errorf("the issuing chain ended at %s", end.Format(time.RFC3339))
	}
	// It was to be renewed at half of its life. From here on what is issued would
	// be cut: another replica does better.
	if life := end.Sub(ca.Chain[0].NotBefore); end.Sub(now) < min(p.x509SVIDTTL, life/4) {
		return fmt.Errorf("the issuing chain ends at %s and could not be renewed", end.Format(time.RFC3339))
	}
	published := p.registry.Trust()
	if published == nil {
		return errors.New("no trust bundle is published")
	}
	return p.checkJWTKey(published.Keys.HasJWTAuthority)
}

// checkJWTKey says why nobody would verify JWT-SVIDs for long. A key that is
// here and active already is the next to sign (follow), and until it does the
// one before is good.
func (p *parts) checkJWTKey(trusted func(kid string) bool) error {
	kid := p.keys.JWT().KeyID
	if !trusted(kid) {
		return fmt.Errorf("JWT key %s signs here, and is not in the trust bundle: start this CA again, or let it join anew", kid)
	}
	set := p.registry.Authorities()
	if len(set.All()) == 0 {
		return nil // of an older Merlon, until the root holder writes them down
	}
	active := set.JWT(p.keys.Name())
	if a, ok := set.Get(kid); ok && active == nil && a.State == rotation.Published {
		return nil // it has joined, and agents ask another replica until it may sign
	}
	if active == nil {
		return fmt.Errorf("JWT key %s signs here, and no JWT key of this replica is active: see merlon authority list", kid)
	}
	if !p.keys.HoldsJWT(active.ID) {
		return fmt.Errorf("JWT key %s signs here, and the active one, %s, is missing: bring back data_dir/keys, or start this CA again", kid, active.ID)
	}
	return nil
}

// upkeep does what each replica does for itself; what fails comes again a
// minute later.
func (p *parts) upkeep(ctx context.Context, now time.Time) {
	p.each(ctx, map[string]func(context.Context) error{
		"renew the intermediate": func(ctx context.Context) error { return p.renewIntermediate(ctx, now) },
		"replace the root":       func(context.Context) error { return p.authorities.endangered(now) },
		"read the upstream":      func(context.Context) error { return p.keys.UpstreamFault() },
	})
}

// chores does what one does for all replicas. Each write holds only while fence
// does: nobody else has led since.
func (p *parts) chores(ctx context.Context, now time.Time, leader store.Leadership) {
	fence := leader.Fence()
	p.each(ctx, map[string]func(context.Context) error{
		"remove expired entries": func(ctx context.Context) error { return p.removeEntries(ctx, now, fence) },
		"remove old revocations": func(ctx context.Context) error {
			return p.remove(ctx, p.overdue.ripe(p.registry.ExpiredRevocations(now), now), fence)
		},
		"remove expired tokens": func(ctx context.Context) error { return p.removeTokens(ctx, now, fence) },
		"renew policy bundles":  func(ctx context.Context) error { return p.renewPolicies(ctx, now, fence) },
		"remove stray policies": func(ctx context.Context) error { return p.releases.Prune(ctx, now, fence) },
	})
}

func (p *parts) each(ctx context.Context, chores map[string]func(context.Context) error) {
	for name, chore := range chores {
		bounded, cancel := context.WithTimeout(ctx, choreTimeout)
		err := chore(bounded)
		cancel()
		if err != nil && ctx.Err() == nil {
			level := slog.LevelError
			if errors.Is(err, store.ErrReadOnly) || errors.Is(err, store.ErrUnavailable) || errors.Is(err, api.ErrEvicted) {
				level = slog.LevelDebug // /ready says so, and the chore comes again
			}
			p.log.LogAttrs(ctx, level, "upkeep failed", slog.String("chore", name), slog.Any("err", err))
		}
	}
}

func (p *parts) renewIntermediate(ctx context.Context, now time.Time) error {
	if err := p.service.Standing(); err != nil {
		return err
	}
	renewed, err := p.keys.RenewIntermediate(ctx, now)
	if p.keys.HoldsRoot() {
		err = errors.Join(err, p.register(ctx, now)) // also what somebody removed
	}
	if !renewed {
		return err
	}
	ca := p.keys.X509()
	return errors.Join(err, p.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Renew, Actor: "ca", Detail: "intermediate", AuthorityID: ca.ID(), NotAfter: ca.Chain[0].NotAfter,
	}))
}

// renewPolicies keeps policies from ending because nobody changes them.
func (p *parts) renewPolicies(ctx context.Context, now time.Time, fence ...store.Cmp) error {
	renewed, err := p.releases.Renew(ctx, now, fence...)
	return p.recordRenewed(ctx, now, renewed, err)
}

// enterEpoch lets agents take the policy of a store that was restored. A bundle
// that cannot be signed again is no reason not to serve: upkeep comes by it
// again, and a push helps.
func (p *parts) enterEpoch(ctx context.Context, now time.Time) {
	renewed, err := p.releases.EnterEpoch(ctx, now)
	if err := p.recordRenewed(ctx, now, renewed, err); err != nil {
		p.log.LogAttrs(ctx, slog.LevelError, "policy bundles not renewed after a restore: merlon policy push each that is named", slog.Any("err", err))
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
func (p *parts) removeEntries(ctx context.Context, now time.Time, fence store.Cmp) error {
	for _, e := range p.registry.ExpiredEntries(now) {
		if err := p.removeEntry(ctx, now, e, fence); err != nil {
			return err
		}
	}
	return nil
}

func (p *parts) removeEntry(ctx context.Context, now time.Time, e *entry.Entry, fence store.Cmp) error {
	key := registry.EntryPrefix + e.ID
	res, err := p.store.Txn(ctx, []store.Cmp{{Key: key, ModRevision: e.Revision}, fence}, []store.Op{store.Delete(key)}, nil)
	if err != nil || !res.Succeeded { // an operator, or another leader, was faster
		return err
	}
	return p.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Admin, Actor: "ca", Detail: "entry expired", EntryID: e.ID, SPIFFEID: e.SPIFFEID.String(),
	})
}

func (p *parts) removeTokens(ctx context.Context, now time.Time, fence store.Cmp) error {
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
	return p.remove(ctx, expired, fence)
}

// remove deletes keys, as many to a transaction as fit, while fence holds.
func (p *parts) remove(ctx context.Context, keys []string, fence store.Cmp) error {
	for len(keys) > 0 {
		n := min(len(keys), store.MaxTxnOps)
		ops := make([]store.Op, n)
		for i, key := range keys[:n] {
			ops[i] = store.Delete(key)
		}
		res, err := p.store.Txn(ctx, []store.Cmp{fence}, ops, nil)
		if err != nil {
			return err
		}
		if !res.Succeeded {
			return errNotLeading
		}
		keys = keys[n:]
	}
	return nil
}

// The authorities of the CA as they follow each other: this replica takes the
// steps of its own keys, makes the keys that they need, and does what the steps
// of others ask of it. What may be done when is decided in ca/internal/rotation;
// each step is one transaction of ca/internal/trust.

package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/svid"
)

const (
	// revocationLife outlives every SVID that an authority can have signed.
	revocationLife = entry.MaxSVIDTTL + time.Minute
	// followRetry is when to try again what a step asks for, such as a certificate
	// from the root holder.
	followRetry = 2 * time.Second
	maxTick     = upkeepInterval
	minTick     = time.Second
)

// authorities implements api.Authorities.
type authorities struct {
	domain   trust.Domain
	policy   rotation.Policy
	keys     *upstream.Keys
	registry *registry.Registry
	audit    *audit.Log
	log      *slog.Logger
	// registered makes the store say of this replica what is so.
	registered func(context.Context, time.Time) error
	// above is the CA above a nested one, which judges its steps; nil: there is none.
	above *above
	// caughtUp makes the store know of every agent that this replica has renewed.
	caughtUp func(context.Context) error
	viewer   registry.Viewer
	// jwtKeyTTL is what a JWT key lives.
	jwtKeyTTL time.Duration

	// lastCalls counts the roots that began to sign without somebody.
	lastCalls prometheus.Counter

	// making is held while a key is made, written down and published, so that
	// nobody takes it for one that the store has lost, or a crash left behind.
	making sync.Mutex
}

// Prepare implements api.Authorities.
func (a *authorities) Prepare(ctx context.Context, kind rotation.Kind) (string, uint64, error) {
	a.making.Lock()
	defer a.making.Unlock()
	return a.prepare(ctx, kind)
}

// prepare is Prepare while a.making is held.
func (a *authorities) prepare(ctx context.Context, kind rotation.Kind) (string, uint64, error) {
	if err := a.registry.Authorities().Room(kind, a.keys.Name()); err != nil {
		return "", 0, err
	}
	made, err := a.makeKey(kind, time.Now())
	if err != nil {
		return "", 0, err
	}
	if _, _, err := a.take(ctx, rotation.Command{Verb: rotation.Prepare, New: made}); err != nil {
		if _, refused := errors.AsType[*rotation.RefusedError](err); refused { // others were faster
			_, gone := a.keys.Discard(made.ID)
			err = errors.Join(err, gone)
		}
		return "", 0, err
	}
	_, revision, err := a.take(ctx, rotation.Command{Verb: rotation.Publish, ID: made.ID})
	return made.ID, revision, err
}

func (a *authorities) makeKey(kind rotation.Kind, now time.Time) (*rotation.Authority, error) {
	switch kind {
	case rotation.Root:
		if a.above != nil {
			return nil, status.Errorf(codes.FailedPrecondition, "the root is that of the CA above, at %s: prepare the next one there", a.above.address)
		}
		root, err := a.keys.PrepareRoot(now)
		if errors.Is(err, upstream.ErrNoRootKey) {
			return nil, status.Error(codes.FailedPrecondition, "this replica does not hold the root key: ask the one that does (merlon replica list)")
		}
		if errors.Is(err, upstream.ErrUpstreamRoot) {
			return nil, status.Error(codes.FailedPrecondition, err.Error())
		}
		if err != nil {
			return nil, err
		}
		return a.rootAuthority(root), nil
	case rotation.JWT:
		if a.above != nil {
			if spare, ok := a.spareJWT(); ok {
				return a.jwtAuthority(spare, now), nil
			}
		}
		key, err := a.keys.PrepareJWT()
		if err != nil {
			return nil, err
		}
		return a.jwtAuthority(key, now), nil
	}
	return nil, &entry.InvalidError{Field: "kind", Reason: fmt.Sprintf("%.80q is neither %s nor %s; an intermediate is renewed by itself", kind, rotation.Root, rotation.JWT)}
}

func (a *authorities) rootAuthority(root *upstream.Root) *rotation.Authority {
	cert := root.Certificate
	return &rotation.Authority{
		ID: rootID(cert), Kind: rotation.Root, Replica: a.keys.Name(), Certificate: cert.Raw,
		// Its life begins when it was made, which NotBefore is a minute before.
		NotBefore: cert.NotBefore.Add(authority.Backdate).UTC(), NotAfter: cert.NotAfter.UTC(), Seal: root.Seal, SealedBy: root.SealedBy,
	}
}

func (a *authorities) jwtAuthority(key upstream.JWTKey, now time.Time) *rotation.Authority {
	return &rotation.Authority{
		ID: key.KeyID, Kind: rotation.JWT, Replica: a.keys.Name(), PublicKey: key.PKIX,
		NotBefore: now.UTC(), NotAfter: now.Add(a.jwtKeyTTL).UTC(),
	}
}

// Take implements api.Authorities. What was activated signs when it returns.
func (a *authorities) Take(ctx context.Context, c rotation.Command) (uint64, error) {
	revision, err := a.takeHere(ctx, c)
	if err != nil || c.Verb != rotation.Activate {
		return revision, err
	}
	if err := a.registry.Wait(ctx, revision); err != nil {
		return revision, err
	}
	if err := a.follow(ctx); err != nil { // run comes by it again
		a.log.LogAttrs(ctx, slog.LevelWarn, "step of an authority not followed yet", slog.Any("err", err))
	}
	return revision, nil
}

// takeHere takes one step. A key is activated where it is, so that it signs from
// then on, and not before.
func (a *authorities) takeHere(ctx context.Context, c rotation.Command) (uint64, error) {
	if c.Verb == rotation.Activate {
		if held, ok := a.registry.Authorities().Get(c.ID); ok && held.Replica != a.keys.Name() {
			return 0, status.Errorf(codes.FailedPrecondition, "activate %s: its key is on replica %s: ask that one", c.ID, held.Replica)
		}
	}
	_, revision, err := a.take(ctx, c)
	return revision, err
}

// take takes one step, judged by a picture that has everything which the store
// had when the step was begun, and which was not to be forgotten here.
func (a *authorities) take(ctx context.Context, c rotation.Command) (*trust.Step, uint64, error) {
	if a.above != nil {
		if err := approval.Spend(ctx, a.domain.Store, a.registry.Authorities().Standing(c.ID)); err != nil {
			return nil, 0, err
		}
		revision, err := a.above.step(ctx, c)
		return nil, revision, err
	}
	return a.takeIf(ctx, c, func(rotation.Set) error { return nil })
}

// takeIf is take where may allows it of the set that is stored.
func (a *authorities) takeIf(ctx context.Context, c rotation.Command, may func(rotation.Set) error) (*trust.Step, uint64, error) {
	if err := a.caughtUp(ctx); err != nil {
		return nil, 0, err
	}
	revision, err := a.domain.Store.Revision(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("read the store's revision: %w", err)
	}
	if err := a.registry.Wait(ctx, revision); err != nil {
		return nil, 0, err
	}
	now := time.Now()
	var before rotation.Set
	var left rotation.Wait
	step, revision, err := a.domain.Take(ctx, func(set rotation.Set) (rotation.Set, error) {
		if err := may(set); err != nil {
			return set, err
		}
		before = set
		_, view := a.registry.Rotation(now, a.viewer)
		if c.Verb == rotation.Activate && !c.Force {
			left = rotation.LeftBehind(set, c.ID, view, a.policy, now)
		}
		return rotation.Step(set, c, view, a.policy, now)
	}, func(step *trust.Step) error {
		granted, ends, err := approval.Join(ctx, before.Standing(c.ID))
		if err != nil {
			return err
		}
		step.Cmps, step.Ops = append(step.Cmps, granted...), append(step.Ops, ends...)
		if err := a.recordLeftBehind(ctx, c.ID, left, before.Root(), now); err != nil {
			return err
		}
		return a.withStep(ctx, step, c, before, now)
	})
	if err == nil {
		a.sayLeftBehind(ctx, c.ID, left, before.Root())
	}
	return step, revision, err
}

// withStep adds what belongs to the step's transaction: the record of the replica
// whose JWT key is another now, and the revocation of what a revoked authority
// has signed.
func (a *authorities) withStep(ctx context.Context, step *trust.Step, c rotation.Command, before rotation.Set, now time.Time) error {
	subject, ok := step.Authorities.Get(c.ID)
	if !ok {
		return nil
	}
	was, _ := before.Get(c.ID)
	switch {
	case c.Verb == rotation.Activate && subject.Kind == rotation.JWT:
		rec, err := replica.Read(ctx, a.domain.Store, subject.Replica)
		if err != nil {
			return err
		}
		next := *rec
		next.JWTKeyID = subject.ID
		put, err := next.Put()
		if err != nil {
			return err
		}
		step.Cmps, step.Ops = append(step.Cmps, rec.Cmp()), append(step.Ops, put)
	case c.Verb == rotation.Revoke && (was.State == rotation.Old || was.State == rotation.Tainted):
		put, _, err := revocation.PutForGood(svid.Revocation{AuthorityID: subject.ID, ExpiresAt: now.Add(revocationLife), Note: "authority revoked"})
		if err != nil {
			return err
		}
		step.Ops = append(step.Ops, put)
	}
	return nil
}

// run does what steps ask for, and takes those that are due, until ctx ends.
func (a *authorities) run(ctx context.Context, standing func() error) error {
	tick := time.NewTicker(min(max(a.policy.RefreshHint/4, minTick), maxTick))
	defer tick.Stop()
	for {
		steps := a.registry.StepsTaken()
		wait := time.Duration(1<<62 - 1)
		if standing() == nil {
			if err := a.follow(ctx); err != nil && ctx.Err() == nil {
				a.log.LogAttrs(ctx, slog.LevelWarn, "step of an authority not followed yet", slog.Any("err", err))
				wait = followRetry
			}
			a.takeDue(ctx)
		}
		retry := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			retry.Stop()
			return nil
		case <-steps:
		case <-tick.C:
		case <-retry.C:
		}
		retry.Stop()
	}
}

// follow brings this replica's keys to what the store says: roots that are to be
// trusted, the root and the JWT key that sign, and nothing that is revoked.
func (a *authorities) follow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	set := a.registry.Authorities()
	var errs []error
	for _, root := range set.All() {
		if root.Kind != rotation.Root || !root.State.Trusted() {
			continue
		}
		// One that is old may have been before this replica's time, or be what
		// leads to the one that signs.
		if err := a.trustRoot(root); root.State == rotation.Published || root.State == rotation.Active {
			errs = append(errs, err)
		}
	}
	if root := set.Root(); root != nil {
		errs = append(errs, a.useRoot(ctx, root.ID))
	}
	if jwt := set.JWT(a.keys.Name()); jwt != nil {
		errs = append(errs, a.keys.UseJWT(jwt.ID))
	}
	for _, gone := range set.All() {
		if gone.State != rotation.Revoked {
			continue
		}
		found, err := a.keys.Discard(gone.ID)
		errs = append(errs, err)
		if found {
			a.log.LogAttrs(ctx, slog.LevelInfo, "key of a revoked authority removed", slog.String("authority_id", gone.ID))
		}
	}
	return errors.Join(errs...)
}

func (a *authorities) trustRoot(root rotation.Authority) error {
	if a.keys.HoldsRoot() {
		return nil // it has their keys, or they are not its own
	}
	cert, err := x509.ParseCertificate(root.Certificate)
	if err != nil {
		return fmt.Errorf("read root %s: %w", root.ID, err)
	}
	return a.keys.AddAnchor(cert, root.Seal, root.SealedBy)
}

func (a *authorities) useRoot(ctx context.Context, id string) error {
	now := time.Now()
	if rootID(a.keys.X509().Root) == id {
		return nil
	}
	changed, err := a.keys.UseRoot(ctx, id, now)
	if !changed {
		return err
	}
	ca := a.keys.X509()
	a.log.LogAttrs(ctx, slog.LevelInfo, "CA signs under another root", slog.String("authority_id", ca.ID()), slog.String("root", id))
	errs := []error{err, a.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Renew, Actor: "ca", Detail: "intermediate under root " + id, AuthorityID: ca.ID(), NotAfter: ca.Chain[0].NotAfter,
	})}
	if a.keys.HoldsRoot() { // of others the root holder has written it down
		errs = append(errs, a.registered(ctx, now))
	}
	return errors.Join(errs...)
}

// takeDue takes the steps that are due by themselves. One that fails comes again.
func (a *authorities) takeDue(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, choreTimeout)
	defer cancel()
	a.making.Lock()
	defer a.making.Unlock()
	now := time.Now()
	set, view := a.registry.Rotation(now, a.viewer)
	if len(set.All()) == 0 {
		return // the root holder writes them down first
	}
	for _, c := range rotation.Due(set, a.keys.Name(), a.keys.HoldsRoot() && !a.keys.HasUpstream(), view, a.policy, now) {
		if err := a.takeOne(ctx, c); err != nil {
			level := slog.LevelWarn
			if _, refused := errors.AsType[*rotation.RefusedError](err); refused {
				level = slog.LevelDebug // somebody has taken it, and the picture is behind
			}
			a.log.LogAttrs(ctx, level, "step of an authority not taken",
				slog.String("step", string(c.Verb)), slog.String("authority_id", c.ID), slog.Any("err", err))
			return
		}
	}
}

// endangered says that the root may end before the next one signs, and what lets
// that one sign at once.
func (a *authorities) endangered(now time.Time) error {
	if !a.keys.HoldsRoot() || a.keys.HasUpstream() {
		return nil
	}
	set, view := a.registry.Rotation(now, a.viewer)
	next, waits := rotation.Endangered(set, view, a.policy, now)
	if !waits {
		return nil
	}
	return fmt.Errorf("root %s ends at %s, and with it every SVID under it; the next one waits: %s; mend that, or whoever is missing then needs a new join token; to let it sign at once: merlon authority activate %s --force",
		set.Root().ID, set.Root().NotAfter.UTC().Format(time.RFC3339), next.Wait, next.ID)
}

func (a *authorities) takeOne(ctx context.Context, c rotation.Command) error {
	revision := uint64(0)
	var err error
	if c.Verb == rotation.Prepare {
		c.ID, revision, err = a.prepare(ctx, c.Kind)
	} else {
		revision, err = a.takeHere(ctx, c)
	}
	if err != nil {
		return err
	}
	a.log.LogAttrs(ctx, slog.LevelInfo, "authority changed", slog.String("step", string(c.Verb)), slog.String("authority_id", c.ID))
	if err := a.audit.Append(ctx, audit.Record{Time: time.Now(), Type: audit.Renew, Actor: "ca", Detail: string(c.Verb) + " authority", AuthorityID: c.ID}); err != nil {
		return err
	}
	return a.registry.Wait(ctx, revision)
}

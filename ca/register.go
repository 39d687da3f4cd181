// A replica's place in the store: its record, and its keys among the authorities
// and in the trust bundle. The root holder writes its own; the others' are written
// by it when they join, and only looked at here.

package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/nested"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
)

// errEvicted ends the start of a replica whose record is gone.
var errEvicted = errors.New("this replica has been evicted")

// errNested ends the start of a nested CA that is configured as something else.
var errNested = errors.New("its record and the configuration do not agree on whether it is a nested CA (upstream: merlon)")

// openKeys opens the keys of this CA, which joins first if it has none and is
// to be a replica. A store that belongs to another root is refused.
func (s *Server) openKeys(ctx context.Context, p *parts) error {
	published, err := trust.Current(ctx, p.store)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	p.domain = trust.Domain{Store: p.store, TrustDomain: s.td, RefreshHint: s.cfg.TrustRefreshHint}
	set, err := p.domain.Authorities(ctx)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	cfg, err := s.cfg.Authorities()
	if err != nil {
		return err
	}
	cfg.ExistingRoot = published != nil
	if root := set.Root(); root != nil {
		cfg.ActiveRoot = root.ID
	}
	if next := set.Successor(time.Now()); next != nil {
		cfg.ActiveRoot = next.ID // agents know it, unlike one that is made now
	}
	cfg.ActiveJWT = func(name string) string {
		if jwt := set.JWT(name); jwt != nil {
			return jwt.ID
		}
		return ""
	}
	if p.keysLock, err = upstream.Lock(cfg.Dir); err != nil {
		return err
	}
	holder := &rootHolder{cfg: s.cfg, td: s.td, log: s.log, published: published, own: p.ownIdentity}
	if s.cfg.Nested() {
		p.mirror = &nested.Mirror{Store: p.store, TrustDomain: s.td}
		holder.mirror = p.mirror
	}
	if s.cfg.JoinAddress != "" || s.cfg.Nested() {
		cfg.RootHolder = holder
	}
	if p.keys, err = upstream.Open(ctx, cfg); err != nil {
		return err
	}
	p.authorities = &authorities{
		domain: p.domain, policy: s.cfg.Rotation(), keys: p.keys, audit: p.audit, log: s.log, registered: p.register,
		viewer: registry.Viewer{Replica: p.keys.Name(), X509SVID: s.cfg.X509SVIDTTL, JWTSVID: s.cfg.JWTSVIDTTL}, jwtKeyTTL: s.cfg.JWTKeyTTL,
	}
	if !p.keys.HoldsRoot() {
		return p.checkRegistered(ctx)
	}
	if err := p.refuseNested(ctx); err != nil {
		return err
	}
	now := time.Now()
	if err := p.recordIntermediate(ctx, now); err != nil {
		return err
	}
	return p.register(ctx, now)
}

// recordIntermediate writes down the intermediate that was made while the keys
// were opened, in place of the one that the store knows. The record comes before
// the store knows it: twice rather than never.
func (p *parts) recordIntermediate(ctx context.Context, now time.Time) error {
	rec, err := p.record(ctx)
	ca := p.keys.X509()
	if err != nil || rec == nil || rec.Holds(ca.ID()) {
		return err
	}
	return p.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Renew, Actor: "ca", Detail: "intermediate", AuthorityID: ca.ID(), NotAfter: ca.Chain[0].NotAfter,
	})
}

// recordFirst lets a new log begin with the keys that sign. They are written down
// once the store has them: a record is proof that there is a store.
func (p *parts) recordFirst(ctx context.Context, now time.Time) error {
	if !p.newLog {
		return nil
	}
	ca := p.keys.X509()
	first := func(what, id string, end time.Time) audit.Record {
		return audit.Record{Time: now, Type: audit.Admin, Actor: "ca", Detail: "begin with " + what, AuthorityID: id, NotAfter: end}
	}
	return p.audit.Append(ctx, first("root", rootID(ca.Root), ca.Root.NotAfter),
		first("intermediate", ca.ID(), ca.Chain[0].NotAfter), first("JWT key", p.keys.JWT().KeyID, time.Time{}))
}

// ownIdentity is what this replica shows to the root holder, and the roots by
// which it knows it.
func (p *parts) ownIdentity() (*x509svid.SVID, []*x509.Certificate, error) {
	if p.own == nil {
		return nil, nil, errors.New("the CA has no X509-SVID yet")
	}
	own, err := p.own.GetX509SVID()
	if err != nil {
		return nil, nil, err
	}
	return own, p.keys.Anchors(), nil
}

// register makes what the store says of the root holder what it should be: its
// record, its authorities, and their part of the trust bundle; where all of that
// is, it writes nothing.
func (p *parts) register(ctx context.Context, now time.Time) error {
	p.authorities.making.Lock()
	defer p.authorities.making.Unlock()
	var before rotation.Set
	step, _, err := p.domain.Take(ctx, func(set rotation.Set) (rotation.Set, error) {
		before = set
		return p.ownAuthorities(ctx, set, now)
	}, func(step *trust.Step) error { return p.withRecord(ctx, step, now) })
	if err != nil {
		return fmt.Errorf("register this replica: %w", err)
	}
	return errors.Join(p.rootReplaced(ctx, before, step.Authorities, now), p.jwtReplaced(ctx, before, step.Authorities, now))
}

// rootReplaced says and writes down that another root signs than the store said,
// and why.
func (p *parts) rootReplaced(ctx context.Context, before, after rotation.Set, now time.Time) error {
	was, is := before.Root(), after.Root()
	if !replaced(was, is) {
		return nil
	}
	if known, ok := before.Get(is.ID); ok && known.State == rotation.Published && was.Ended(now) {
		p.log.LogAttrs(ctx, slog.LevelError, "the root ended while this CA was away, and the published one signs from now on: agents whose own SVID has ended need a new join token",
			slog.String("authority_id", is.ID), slog.String("before", was.ID), slog.Time("before_ended", was.NotAfter))
		return p.audit.Append(ctx, audit.Record{
			Time: now, Type: audit.Admin, Actor: "ca", Detail: "activate authority in place of " + was.ID + ", which ended while this CA was away",
			AuthorityID: is.ID, NotAfter: is.NotAfter,
		})
	}
	p.log.LogAttrs(ctx, slog.LevelError, "another root signs from now on, because the one before has ended or its key is not here: agents that do not know it need a new join token and root_hash",
		slog.String("authority_id", is.ID), slog.String("before", was.ID))
	return p.recordForced(ctx, was, is, now)
}

// jwtReplaced is rootReplaced for this replica's JWT key.
func (p *parts) jwtReplaced(ctx context.Context, before, after rotation.Set, now time.Time) error {
	was, is := before.JWT(p.keys.Name()), after.JWT(p.keys.Name())
	if !replaced(was, is) {
		return nil
	}
	p.log.LogAttrs(ctx, slog.LevelError, "another JWT key signs from now on, because the one before is not here: its JWT-SVIDs are refused by those who have not read the trust bundle since",
		slog.String("authority_id", is.ID), slog.String("before", was.ID))
	return p.recordForced(ctx, was, is, now)
}

func replaced(was, is *rotation.Authority) bool { return was != nil && is != nil && was.ID != is.ID }

// recordForced writes down what nobody was asked for, and what waited for nobody.
func (p *parts) recordForced(ctx context.Context, was, is *rotation.Authority, now time.Time) error {
	return p.audit.Append(ctx, audit.Record{
		Time: now, Type: audit.Admin, Actor: "ca", Detail: "activate authority by force, in place of " + was.ID, AuthorityID: is.ID, NotAfter: is.NotAfter,
	})
}

// withRecord adds this replica's record to a step, where it is another now.
func (p *parts) withRecord(ctx context.Context, step *trust.Step, now time.Time) error {
	before, err := p.record(ctx)
	if err != nil {
		return err
	}
	kid := p.keys.JWT().KeyID
	if jwt := step.Authorities.JWT(p.keys.Name()); jwt != nil {
		kid = jwt.ID
	}
	rec := p.ownRecord(before, kid, now)
	if rec == before {
		return nil
	}
	put, err := rec.Put()
	if err != nil {
		return err
	}
	step.Cmps, step.Ops = append(step.Cmps, rec.Cmp()), append(step.Ops, put)
	if before == nil || !slices.Equal(before.PolicyCertificate, rec.PolicyCertificate) {
		step.Ops = append(step.Ops, replica.Mark())
	}
	return nil
}

// record is this replica's record; nil if there is none.
func (p *parts) record(ctx context.Context) (*replica.Record, error) {
	rec, err := replica.Read(ctx, p.store, p.keys.Name())
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return rec, err
}

// ownRecord is the root holder's record as it should be, with the JWT key that
// signs: before, if that is it.
func (p *parts) ownRecord(before *replica.Record, jwtKeyID string, now time.Time) *replica.Record {
	ca := p.keys.X509()
	rec := &replica.Record{Name: p.keys.Name(), JoinedAt: now}
	if before != nil {
		rec = before
		if before.RootHolder && before.Current().ID == ca.ID() && before.JWTKeyID == jwtKeyID &&
			slices.Equal(before.PolicyCertificate, p.keys.PolicyCertificate()) {
			return before
		}
	}
	rec = rec.WithAuthority(replica.Authority{ID: ca.ID(), Root: rootID(ca.Root), NotAfter: ca.Chain[0].NotAfter}, now)
	rec.RootHolder, rec.JWTKeyID, rec.PolicyCertificate = true, jwtKeyID, p.keys.PolicyCertificate()
	return rec
}

// checkRegistered says whether the store knows this replica as what it is.
func (p *parts) checkRegistered(ctx context.Context) error {
	published, err := trust.Current(ctx, p.store)
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w: the store is empty", trust.ErrOtherRoot)
	}
	if err != nil {
		return err
	}
	if !published.Keys.HasX509Authority(p.keys.X509().Root) {
		return trust.ErrOtherRoot
	}
	rec, err := p.record(ctx)
	if err != nil {
		return err
	}
	kid := p.keys.JWT().KeyID
	// The store of a nested CA may be behind, as after a restore: the CA above knows.
	if rec == nil || !p.keys.HoldsJWT(rec.JWTKeyID) || !rec.Nested() && !rec.Holds(p.keys.X509().ID()) || !published.Keys.HasJWTAuthority(kid) {
		return fmt.Errorf("replica %s: %w", p.keys.Name(), errEvicted)
	}
	if rec.Nested() != (p.mirror != nil) {
		return fmt.Errorf("replica %s: %w", p.keys.Name(), errNested)
	}
	p.realm = rec.Realm
	return nil
}

// refuseNested: the root's key is here, and the store is that of a nested CA.
func (p *parts) refuseNested(ctx context.Context) error {
	rec, err := p.record(ctx)
	if err == nil && rec != nil && rec.Nested() {
		err = trust.ErrOtherRoot
	}
	return err
}

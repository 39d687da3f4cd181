// A replica's place in the store: its record, and its JWT key in the trust
// bundle. The root holder writes its own; the others' are written by it when
// they join, and only looked at here.

package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
)

// errEvicted ends the start of a replica whose record is gone.
var errEvicted = errors.New("this replica has been evicted")

const maxRegisterAttempts = 16

// openKeys opens the keys of this CA, which joins first if it has none and is
// to be a replica. A store that belongs to a root already gets no second one.
func (s *Server) openKeys(ctx context.Context, p *parts) error {
	published, err := trust.Current(ctx, p.store)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	cfg, err := s.cfg.upstream()
	if err != nil {
		return err
	}
	cfg.ExistingRoot = published != nil
	if p.keysLock, err = upstream.Lock(cfg.Dir); err != nil {
		return err
	}
	if s.cfg.JoinAddress != "" {
		cfg.RootHolder = &rootHolder{cfg: s.cfg, td: s.td, log: s.log, published: published, own: p.ownIdentity}
	}
	if p.keys, err = upstream.Open(ctx, cfg); err != nil {
		return err
	}
	if p.keys.HoldsRoot() {
		return p.register(ctx, time.Now())
	}
	return p.checkRegistered(ctx)
}

// ownIdentity is what this replica shows to the root holder, and the root by
// which it knows it.
func (p *parts) ownIdentity() (*x509svid.SVID, *x509.Certificate, error) {
	if p.own == nil {
		return nil, nil, errors.New("the CA has no X509-SVID yet")
	}
	own, err := p.own.GetX509SVID()
	if err != nil {
		return nil, nil, err
	}
	return own, p.keys.X509().Root, nil
}

// register makes the root holder's record and its part of the trust bundle what
// they should be; where they are, it writes nothing.
func (p *parts) register(ctx context.Context, now time.Time) error {
	keys, err := p.keys.TrustBundle()
	if err != nil {
		return err
	}
	for range maxRegisterAttempts {
		change, err := trust.Plan(ctx, p.store, keys.TrustDomain(), func(published *spiffebundle.Bundle) error { return trust.Add(published, keys) })
		if err != nil {
			return err
		}
		before, err := p.record(ctx)
		if err != nil {
			return err
		}
		cmps, ops := []store.Cmp{change.Cmp}, change.Ops
		if rec := p.ownRecord(before, now); rec != before {
			put, err := rec.Put()
			if err != nil {
				return err
			}
			cmps, ops = append(cmps, rec.Cmp()), append(ops, put)
			if before == nil || !slices.Equal(before.PolicyCertificate, rec.PolicyCertificate) {
				ops = append(ops, replica.Mark())
			}
		}
		if len(ops) == 0 {
			return nil
		}
		res, err := p.store.Txn(ctx, cmps, ops, nil)
		if err != nil {
			return fmt.Errorf("register this replica: %w", err)
		}
		if res.Succeeded {
			return nil
		}
	}
	return errors.New("register this replica: others keep changing the trust bundle")
}

// record is this replica's record; nil if there is none.
func (p *parts) record(ctx context.Context) (*replica.Record, error) {
	rec, err := replica.Read(ctx, p.store, p.keys.Name())
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	return rec, err
}

// ownRecord is the root holder's record as it should be: before, if that is it.
func (p *parts) ownRecord(before *replica.Record, now time.Time) *replica.Record {
	ca := p.keys.X509()
	rec := &replica.Record{Name: p.keys.Name(), JoinedAt: now}
	if before != nil {
		rec = before
		if before.RootHolder && before.Current().ID == ca.ID() && before.JWTKeyID == p.keys.JWT().KeyID &&
			slices.Equal(before.PolicyCertificate, p.keys.PolicyCertificate()) {
			return before
		}
	}
	rec = rec.WithAuthority(replica.Authority{ID: ca.ID(), NotAfter: ca.Chain[0].NotAfter}, now)
	rec.RootHolder, rec.JWTKeyID, rec.PolicyCertificate = true, p.keys.JWT().KeyID, p.keys.PolicyCertificate()
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
	if rec == nil || rec.JWTKeyID != kid || !rec.Holds(p.keys.X509().ID()) || !published.Keys.HasJWTAuthority(kid) {
		return fmt.Errorf("replica %s: %w", p.keys.Name(), errEvicted)
	}
	return nil
}

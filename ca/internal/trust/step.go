// Steps of the authorities. Each is one transaction: the authorities and the
// trust bundle that they make change together, or not at all, and of two who
// take a step at the same time one does.

package trust

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
)

// AuthoritiesKey is where the store keeps what is known of the authorities.
const AuthoritiesKey = "trust/authorities"

// Domain is what every step of one trust domain has in common.
type Domain struct {
	Store       store.Store
	TrustDomain spiffeid.TrustDomain
	// RefreshHint is what the trust bundle says. Zero means RefreshHint.
	RefreshHint time.Duration
}

// Step is a prepared step, as a part of a transaction.
type Step struct {
	// Authorities and Bundle are what is stored after it.
	Authorities rotation.Set
	Bundle      *Bundle
	// Cmps hold while nobody else takes a step.
	Cmps []store.Cmp
	// Ops write it; none where everything stays as it is.
	Ops []store.Op
}

// Authorities reads the stored authorities; store.ErrNotFound before the first.
func (d Domain) Authorities(ctx context.Context) (rotation.Set, error) {
	kv, _, err := d.Store.Get(ctx, AuthoritiesKey)
	if err != nil {
		return rotation.Set{}, fmt.Errorf("read the authorities: %w", err)
	}
	return rotation.Decode(kv.Value)
}

// Plan prepares the step that take makes of the stored authorities, of none at
// first.
func (d Domain) Plan(ctx context.Context, take func(rotation.Set) (rotation.Set, error)) (*Step, error) {
	var before rotation.Set
	kv, _, err := d.Store.Get(ctx, AuthoritiesKey)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return nil, fmt.Errorf("read the authorities: %w", err)
	default:
		if before, err = rotation.Decode(kv.Value); err != nil {
			return nil, err
		}
	}
	after, err := take(before)
	if err != nil {
		return nil, err
	}
	if err := d.checkNew(ctx, before, after); err != nil {
		return nil, err
	}
	change, err := plan(ctx, d.Store, d.TrustDomain, func(c *content) error { return d.edit(c, before, after) })
	if err != nil {
		return nil, err
	}
	after = after.Stamped(change.Bundle.Sequence)
	step := &Step{
		Authorities: after, Bundle: change.Bundle, Ops: change.Ops,
		Cmps: []store.Cmp{{Key: AuthoritiesKey, ModRevision: kv.ModRevision}, change.Cmp},
	}
	if after.Equal(before) {
		return step, nil
	}
	value, err := after.Encode()
	if err != nil {
		return nil, err
	}
	gone, err := remember(before, after)
	step.Ops = append(append(step.Ops, store.Put(AuthoritiesKey, value)), gone...)
	return step, err
}

// edit makes the trust bundle hold what after trusts, and nothing any more that
// before trusted and after does not.
func (d Domain) edit(c *content, before, after rotation.Set) error {
	c.hint = d.RefreshHint
	if c.hint == 0 {
		c.hint = RefreshHint
	}
	c.tainted = after.TaintedIDs()
	for _, a := range before.All() {
		now, ok := after.Get(a.ID)
		if a.State.Trusted() && (!ok || !now.State.Trusted()) {
			if err := c.remove(a); err != nil {
				return err
			}
		}
	}
	for _, a := range after.All() {
		if !a.State.Trusted() {
			continue
		}
		if err := c.add(a); err != nil {
			return err
		}
	}
	if len(c.keys.X509Authorities()) == 0 {
		return errors.New("the trust bundle would hold no root: nobody would trust anybody, and no agent takes it")
	}
	return nil
}

func (c *content) add(a rotation.Authority) error {
	if a.Kind == rotation.JWT {
		key, err := x509.ParsePKIXPublicKey(a.PublicKey)
		if err != nil {
			return fmt.Errorf("read JWT key %s: %w", a.ID, err)
		}
		if err := c.keys.AddJWTAuthority(a.ID, key); err != nil {
			return fmt.Errorf("add JWT key %s to the trust bundle: %w", a.ID, err)
		}
		return nil
	}
	cert, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return fmt.Errorf("read root %s: %w", a.ID, err)
	}
	c.keys.AddX509Authority(cert)
	return nil
}

func (c *content) remove(a rotation.Authority) error {
	if a.Kind == rotation.JWT {
		c.keys.RemoveJWTAuthority(a.ID)
		return nil
	}
	cert, err := x509.ParseCertificate(a.Certificate)
	if err != nil {
		return fmt.Errorf("read root %s: %w", a.ID, err)
	}
	c.keys.RemoveX509Authority(cert)
	return nil
}

// ErrContended is returned by Take where others were faster each time.
var ErrContended = errors.New("others keep changing the authorities")

// Take takes one step, with what extra adds to its transaction, and returns the
// revision that wrote it; 0 where it changes nothing. Where others get in
// between it begins anew; extra may be nil.
func (d Domain) Take(ctx context.Context, take func(rotation.Set) (rotation.Set, error), extra func(*Step) error) (*Step, uint64, error) {
	for range maxAttempts {
		step, err := d.Plan(ctx, take)
		if err != nil {
			return nil, 0, err
		}
		if extra != nil {
			if err := extra(step); err != nil {
				return nil, 0, err
			}
		}
		if len(step.Ops) == 0 {
			return step, 0, nil
		}
		res, err := d.Store.Txn(ctx, step.Cmps, step.Ops, nil)
		if err != nil {
			return nil, 0, fmt.Errorf("write the authorities: %w", err)
		}
		if res.Succeeded {
			return step, res.Revision, nil
		}
	}
	return nil, 0, fmt.Errorf("write the authorities: %w: nothing was written, try again", ErrContended)
}

// Signing again what is there: before it ends, in the next epoch of a store that was
// restored, and in place of a key that is withdrawn.

package release

import (
	"context"
	"errors"
	"fmt"
	"time"

	"merlon.dev/ca/internal/store"
)

// Renew signs each bundle again whose validity is half over at now, as a new
// generation of the same content, and returns the new heads: otherwise a policy
// that nobody has touched for a year would end, and with it every call. So it
// does with what EnterEpoch has left over.
// Nothing is written unless all of fence holds.
func (p *Publisher) Renew(ctx context.Context, now time.Time, fence ...store.Cmp) ([]*Head, error) {
	return p.renewWhere(ctx, renewal{now: now, fence: fence, unsign: p.opts.Unsign, due: func(h *Head, revision uint64) bool {
		return now.After(h.IssuedAt.Add(h.NotAfter.Sub(h.IssuedAt)/2)) || store.BeforeEpoch(revision, h.Generation)
	}})
}

// EnterEpoch gives each bundle of a store that was restored (store.Epoch) a
// generation above all that the lost revisions can have had, with the same
// content, and returns the new heads. Elsewhere it does nothing. The CA calls
// it before it serves.
func (p *Publisher) EnterEpoch(ctx context.Context, now time.Time) ([]*Head, error) {
	return p.renewWhere(ctx, renewal{now: now, unsign: p.opts.Unsign, due: func(h *Head, revision uint64) bool {
		return store.BeforeEpoch(revision, h.Generation)
	}})
}

// Reseal signs each bundle again that unsign gives back, as a new generation of
// the same content, and returns the new heads. Others stay as they are.
func (p *Publisher) Reseal(ctx context.Context, now time.Time, unsign Unsign) ([]*Head, error) {
	return p.renewWhere(ctx, renewal{
		now: now, due: func(*Head, uint64) bool { return true },
		unsign: func(signed []byte, name string, candidate bool) ([]byte, error) {
			unsigned, err := unsign(signed, name, candidate)
			if err != nil {
				return nil, errNotOurs
			}
			return unsigned, nil
		},
	})
}

// errNotOurs: the bundle is not one that is to be signed again.
var errNotOurs = errors.New("signed by another key")

// renewal is one round over all bundles.
type renewal struct {
	now    time.Time
	due    func(h *Head, revision uint64) bool // in a store at revision
	unsign Unsign
	fence  []store.Cmp
}

// renewWhere renews the bundles that are due.
func (p *Publisher) renewWhere(ctx context.Context, r renewal) ([]*Head, error) {
	kvs, revision, _, err := p.opts.Store.List(ctx, HeadPrefix, "", maxNames, 0)
	if err != nil {
		return nil, fmt.Errorf("list policy bundles: %w", err)
	}
	var renewed []*Head
	var errs []error
	for _, kv := range kvs {
		h, err := DecodeHead(kv)
		if err == nil && r.due(h, revision) {
			if h, err = p.renew(ctx, h, r); h != nil {
				renewed = append(renewed, h)
			}
		}
		if !errors.Is(err, errNotOurs) {
			errs = append(errs, err) // the others are renewed all the same
		}
	}
	return renewed, errors.Join(errs...)
}

// renew returns nil when somebody pushed meanwhile.
func (p *Publisher) renew(ctx context.Context, before *Head, r renewal) (*Head, error) {
	active, candidate, err := p.unsignBoth(ctx, before, r)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil // replaced since the listing
	}
	if err != nil {
		return nil, err
	}
	again := newRelease(Renewed, r.now)
	again.Of = before.origin()
	next := before.succeed(before.Name, again)
	d := draft{next: next, seals: []toSeal{{&next.Release, false, active}}}
	if candidate != nil {
		next.Candidate = before.Candidate.next(r.now, before.Candidate.Canary)
		next.Candidate.Release = newRelease(before.Candidate.How, r.now)
		d.seals = append(d.seals, toSeal{&next.Candidate.Release, true, candidate})
	}
	return p.commit(ctx, before, d, r.fence...)
}

// unsignBoth gives back what h has in force, and its candidate: nil where there is
// none, or none that can be signed again.
//
// Only what this CA signed: who can write the store alone must not have his policy
// signed.
func (p *Publisher) unsignBoth(ctx context.Context, h *Head, r renewal) (active, candidate []byte, err error) {
	signed, err := p.readBlob(ctx, h.Name, &h.Release)
	if err != nil {
		return nil, nil, err
	}
	active, err = r.unsign(signed, h.Name, false)
	candidateErr := errNotOurs
	if h.Candidate != nil {
		if signed, readErr := p.readBlob(ctx, h.Name, &h.Candidate.Release); readErr == nil {
			if candidate, candidateErr = r.unsign(signed, h.Name, true); errors.Is(candidateErr, errNotOurs) {
				candidate, _ = p.opts.Unsign(signed, h.Name, true) // it goes with the other, or not at all
			}
		}
	}
	// One of the two is to be signed again: so is the other.
	if errors.Is(err, errNotOurs) && candidateErr == nil {
		active, err = p.opts.Unsign(signed, h.Name, false)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("renew policy bundle %s: %w", h.Name, err)
	}
	return active, candidate, nil
}

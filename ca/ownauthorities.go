// The authorities whose keys are on this root holder, as the store should have
// them: also in the store of an older Merlon, which had no such records, and in
// one that was restored and has forgotten some.

package ca

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/svid"
)

// rootID names a root. Ours have a key ID, and so have nearly all others.
func rootID(cert *x509.Certificate) string {
	if len(cert.SubjectKeyId) == 0 {
		return svid.KeyHash(cert)
	}
	return hex.EncodeToString(cert.SubjectKeyId)
}

// ownAuthorities adds to set what is missing of this CA's keys. What signs here
// signs; what else is here, and is not known, is prepared.
func (p *parts) ownAuthorities(ctx context.Context, set rotation.Set, now time.Time) (rotation.Set, error) {
	roots, err := p.livingRoots(ctx, set)
	if err != nil {
		return set, err
	}
	if set, err = p.firstAuthorities(ctx, set, roots, now); err != nil {
		return set, err
	}
	if set, err = p.ownRoots(set, roots, now); err != nil {
		return set, err
	}
	// An old copy of the keys may hold nothing but what is revoked by now.
	if root := set.Root(); root == nil || !holds(roots, root.ID) {
		return set, trust.ErrOtherRoot
	}
	return p.ownJWTKeys(ctx, set, now)
}

// livingRoots are the roots whose keys are here but for those that were
// withdrawn, as an old copy of the keys holds them: their keys are removed. A CA
// that holds no other is refused.
func (p *parts) livingRoots(ctx context.Context, set rotation.Set) ([]*upstream.Root, error) {
	roots, err := p.keys.Roots()
	if err != nil {
		return nil, err
	}
	var living []*upstream.Root
	var withdrawn *trust.WithdrawnError
	for _, root := range roots {
		gone, err := p.removeWithdrawn(ctx, set, rootID(root.Certificate))
		if err != nil {
			return nil, err
		}
		if gone == nil {
			living = append(living, root)
		} else {
			withdrawn = gone
		}
	}
	if len(living) == 0 && withdrawn != nil {
		return nil, withdrawn
	}
	return living, nil
}

// removeWithdrawn removes a key that was withdrawn and has left the list since;
// nil: it was not.
func (p *parts) removeWithdrawn(ctx context.Context, set rotation.Set, id string) (*trust.WithdrawnError, error) {
	if _, known := set.Get(id); known {
		return nil, nil
	}
	gone, err := p.domain.Withdrawn(ctx, id)
	if err != nil || gone == nil {
		return nil, err
	}
	found, err := p.keys.Discard(id)
	if found {
		p.log.LogAttrs(ctx, slog.LevelWarn, "key of a withdrawn authority was here again, as in an old copy of the keys, and is removed", slog.String("authority_id", id))
	}
	return gone, err
}

func holds(roots []*upstream.Root, id string) bool {
	return slices.ContainsFunc(roots, func(r *upstream.Root) bool { return rootID(r.Certificate) == id })
}

// firstAuthorities are those of a store without any: of a new one, none; of an
// older Merlon's, the JWT keys of the other replicas. A store that belongs to
// another root is refused.
func (p *parts) firstAuthorities(ctx context.Context, set rotation.Set, roots []*upstream.Root, now time.Time) (rotation.Set, error) {
	published, err := trust.Current(ctx, p.store)
	if errors.Is(err, store.ErrNotFound) {
		return set, nil
	}
	if err != nil {
		return set, err
	}
	if !slices.ContainsFunc(roots, func(r *upstream.Root) bool {
		_, known := set.Get(rootID(r.Certificate))
		return known || published.Keys.HasX509Authority(r.Certificate)
	}) {
		return set, trust.ErrOtherRoot
	}
	if len(set.All()) > 0 {
		return set, nil
	}
	records, err := p.records(ctx)
	if err != nil {
		return set, err
	}
	for _, rec := range records {
		key, ok := published.Keys.FindJWTAuthority(rec.JWTKeyID)
		if !ok || rec.Name == p.keys.Name() {
			continue
		}
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return set, fmt.Errorf("encode the JWT key of replica %s: %w", rec.Name, err)
		}
		a := p.authorities.jwtAuthority(upstream.JWTKey{KeyID: rec.JWTKeyID, PKIX: der}, now)
		a.Replica = rec.Name
		if set, err = set.Enrolled(*a, now); err != nil {
			return set, err
		}
	}
	return set, nil
}

// records are those of all replicas.
func (p *parts) records(ctx context.Context) ([]*replica.Record, error) {
	kvs, _, _, err := p.store.List(ctx, replica.Prefix, "", 1000, 0)
	if err != nil {
		return nil, fmt.Errorf("list the replicas: %w", err)
	}
	var all []*replica.Record
	for _, kv := range kvs {
		if !strings.HasPrefix(kv.Key, replica.Prefix) {
			continue
		}
		rec, err := replica.Decode(kv)
		if err != nil {
			return nil, err
		}
		all = append(all, rec)
	}
	return all, nil
}

func (p *parts) ownRoots(set rotation.Set, roots []*upstream.Root, now time.Time) (rotation.Set, error) {
	signing := rootID(p.keys.X509().Root)
	active := set.Root()
	// The one that the store says is not here, or has ended, and another was made or
	// was published by then.
	lost := active == nil || !holds(roots, active.ID) || active.Ended(now)
	if !lost && active.ID != signing {
		_, known := set.Get(signing)
		lost = !known
	}
	for _, root := range roots {
		var err error
		a := p.authorities.rootAuthority(root)
		if set, err = adopt(set, a, lost && a.ID == signing, now); err != nil {
			return set, err
		}
		set = set.Resealed(a.ID, a.Seal, a.SealedBy)
	}
	return set, nil
}

func (p *parts) ownJWTKeys(ctx context.Context, set rotation.Set, now time.Time) (rotation.Set, error) {
	active := set.JWT(p.keys.Name())
	lost := active == nil || !p.keys.HoldsJWT(active.ID)
	withdrawn, err := p.removeWithdrawn(ctx, set, p.keys.JWT().KeyID)
	if err != nil {
		return set, err
	}
	if lost && (withdrawn != nil || spent(set, p.keys.JWT().KeyID, now)) {
		next, err := p.keys.PrepareJWT()
		if err != nil {
			return set, err
		}
		if err := p.keys.UseJWT(next.KeyID); err != nil {
			return set, err
		}
	}
	keys, err := p.keys.JWTKeys()
	if err != nil {
		return set, err
	}
	for _, key := range keys {
		if gone, err := p.removeWithdrawn(ctx, set, key.KeyID); err != nil {
			return set, err
		} else if gone != nil {
			continue
		}
		if set, err = adopt(set, p.authorities.jwtAuthority(key, now), lost && key.KeyID == p.keys.JWT().KeyID, now); err != nil {
			return set, err
		}
	}
	return set, nil
}

// spent says whether the authority cannot sign again: it was withdrawn, or its
// life is over. An old copy of the keys may hold nothing else.
func spent(set rotation.Set, id string, now time.Time) bool {
	a, ok := set.Get(id)
	return ok && (a.State == rotation.Tainted || a.State == rotation.Revoked || !now.Before(a.NotAfter))
}

// adopt adds a to set if it is not there, and lets it sign at once if it is what
// signs here, and the store has lost that.
func adopt(set rotation.Set, a *rotation.Authority, signs bool, now time.Time) (rotation.Set, error) {
	known, ok := set.Get(a.ID)
	switch {
	case !ok && signs:
		return set.Enrolled(*a, now)
	case !ok && !now.Before(a.NotAfter): // nobody needs it
		return set, nil
	case !ok:
		return rotation.Step(set, rotation.Command{Verb: rotation.Prepare, New: a}, rotation.View{}, rotation.Policy{}, now)
	case signs && known.State == rotation.Prepared:
		var err error
		if set, err = rotation.Step(set, rotation.Command{Verb: rotation.Publish, ID: a.ID}, rotation.View{}, rotation.Policy{}, now); err != nil {
			return set, err
		}
		fallthrough
	case signs && (known.State == rotation.Published || known.State == rotation.Old):
		return rotation.Step(set, rotation.Command{Verb: rotation.Activate, ID: a.ID, Force: true}, rotation.View{}, rotation.Policy{}, now)
	}
	return set, nil
}

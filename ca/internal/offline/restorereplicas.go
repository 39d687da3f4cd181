// What becomes of replicas when a restore loses something: none comes back, as
// one that was evicted since would be one again. What they can have signed is
// withdrawn for good, as if each were evicted; their records are kept aside
// until the policy bundles that they signed are signed anew.

package offline

import (
	"cmp"
	"encoding/json"
	"iter"
	"slices"
	"time"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

// dropReplica leaves out the replica of a record, unless it holds the root, or the
// store is that of the nested CA itself: the CA above knows whether it was evicted.
func (r *Restored) dropReplica(cfg config.Config, kv store.KV) error {
	rec, err := replica.Decode(kv)
	if err != nil || rec.RootHolder || cfg.Nested() {
		return err
	}
	former, err := rec.PutFormer()
	if err != nil {
		return err
	}
	r.write(former)
	r.Replicas, r.jwtKeys = append(r.Replicas, rec.Name), append(r.jwtKeys, rec.JWTKeyID)
	return r.withdraw(api.Withdrawn(rec, []string{rec.JWTKeyID}, time.Now()))
}

// dropJWTKeys leaves out what the stored authorities name beside the keys that
// sign: those that the replicas signed with before, or were about to.
func (r *Restored) dropJWTKeys(authorities store.KV) error {
	if authorities.Key == "" { // of an older Merlon
		return nil
	}
	keys, err := trust.JWTKeys(authorities)
	if err != nil {
		return err
	}
	for kid, name := range keys {
		if !slices.Contains(r.Replicas, name) || slices.Contains(r.jwtKeys, kid) {
			continue
		}
		r.jwtKeys = append(r.jwtKeys, kid)
		if err := r.withdraw(api.Withdrawn(&replica.Record{Name: name}, []string{kid}, time.Now())); err != nil {
			return err
		}
	}
	return nil
}

// skipRealms leaves out those that can have been given to nested CAs since: which,
// the audit log says as far as the root holder's is here, and has not been put back.
func (r *Restored) skipRealms(cfg config.Config, last store.KV) error {
	if cfg.Nested() { // gives out none
		return nil
	}
	put, err := replica.PutSkipped(last, api.RealmsGiven(cfg.AuditPath()))
	if err == nil {
		r.write(put)
	}
	return err
}

func (r *Restored) withdraw(revocations []svid.Revocation) error {
	for _, revoked := range revocations {
		put, _, err := revocation.PutForGood(revoked)
		if err != nil {
			return err
		}
		r.write(put)
	}
	return nil
}

// write adds to what is written in place of what is left out.
func (r *Restored) write(op store.Op) {
	at, _ := slices.BinarySearchFunc(r.instead, op.Key, func(kv store.KV, key string) int { return cmp.Compare(kv.Key, key) })
	r.instead = slices.Insert(r.instead, at, store.KV{Key: op.Key, Value: op.Value, ModRevision: r.Revision})
}

// certifiedSince withdraws the authorities that replicas got after t, as far as
// the root holder's audit log is here to name them: the backup knows nothing of
// them.
func certifiedSince(cfg config.Config, t, now time.Time) (revocations []svid.Revocation) {
	first, err := audit.Begin(cfg.AuditPath())
	if err != nil {
		return nil
	}
	for line, err := range audit.Lines(cfg.AuditPath(), first) {
		if err != nil {
			return revocations
		}
		var r audit.Record
		if json.Unmarshal(line.Text, &r) != nil || r.Time.Before(t) || !now.Before(r.NotAfter) {
			continue
		}
		if name, ok := api.CertifiedReplica(r); ok {
			rec := &replica.Record{Name: name, Authorities: []replica.Authority{{ID: r.AuthorityID, NotAfter: r.NotAfter}}}
			revocations = append(revocations, api.Withdrawn(rec, nil, now)...)
		}
	}
	return revocations
}

// withInstead passes pairs on, with those that are written in place of others,
// all in order of their keys.
func (r *Restored) withInstead(pairs iter.Seq2[store.KV, error]) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		left := r.instead
		for kv, err := range pairs {
			for ; err == nil && len(left) > 0 && left[0].Key < kv.Key; left = left[1:] {
				if !yield(left[0], nil) {
					return
				}
			}
			if err == nil && len(left) > 0 && left[0].Key == kv.Key {
				kv, left = left[0], left[1:]
			}
			if !yield(kv, err) || err != nil {
				return
			}
		}
		for _, kv := range left {
			if !yield(kv, nil) {
				return
			}
		}
	}
}

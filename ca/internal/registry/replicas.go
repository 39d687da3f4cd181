// The replicas of the CA in the picture: who they are, and since when the keys
// that sign policy bundles are what they are.

package registry

import (
	"slices"
	"strings"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
)

// replicas is the part of the picture that is about them.
type replicas struct {
	byName map[string]*replica.Record
	// keysAt is the revision at which one came or went last: with it came or went
	// a policy key, of which every stream must hear.
	keysAt uint64
}

// putReplica takes over what lies below replica.Prefix, or replica.MarkKey.
func (p *picture) putReplica(kv store.KV) error {
	if kv.Key == replica.MarkKey {
		p.replicas.keysAt = kv.ModRevision
		return nil
	}
	r, err := replica.Decode(kv)
	if err != nil {
		return err
	}
	p.replicas.byName[r.Name] = r
	return nil
}

// Replicas returns the records of the CA's replicas, ordered by name.
func (r *Registry) Replicas() []*replica.Record {
	r.mu.RLock()
	defer r.mu.RUnlock()
	records := make([]*replica.Record, 0, len(r.pic.replicas.byName))
	for _, rec := range r.pic.replicas.byName {
		records = append(records, rec)
	}
	slices.SortFunc(records, func(a, b *replica.Record) int { return strings.Compare(a.Name, b.Name) })
	return records
}

// Replica returns the record of the replica called name.
func (r *Registry) Replica(name string) (*replica.Record, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	rec, ok := r.pic.replicas.byName[name]
	return rec, ok
}

// ReplicaOf returns the replica that issues, or has issued, under the authority
// with the given ID.
func (r *Registry) ReplicaOf(authority string) (*replica.Record, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, rec := range r.pic.replicas.byName {
		if rec.Holds(authority) {
			return rec, true
		}
	}
	return nil, false
}

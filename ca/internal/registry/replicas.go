// The replicas of the CA in the picture: who they are, and since when the keys
// that sign policy bundles are what they are.

package registry

import (
	"maps"
	"slices"
	"strings"

	"merlon.dev/ca/internal/replica"
)

// replicas is the part of the picture that is about them. There are few.
type replicas struct {
	byName map[string]*replica.Record // replaced, never written to
	// progress is what nested CAs said last, by name; replaced, never written to.
	progress map[string]*replica.Progress
	// keysAt is the revision at which one came or went last: with it came or went
	// a policy key, of which every stream must hear.
	keysAt uint64
}

func (s replicas) with(r *replica.Record) replicas {
	s.byName = maps.Clone(s.byName)
	s.byName[r.Name] = r
	return s
}

func (s replicas) without(name string) replicas {
	s.byName = maps.Clone(s.byName)
	delete(s.byName, name)
	return s
}

func (s replicas) heard(p *replica.Progress) replicas {
	s.progress = maps.Clone(s.progress)
	if s.progress == nil {
		s.progress = make(map[string]*replica.Progress)
	}
	s.progress[p.Name] = p
	return s
}

func (s replicas) silent(name string) replicas {
	s.progress = maps.Clone(s.progress)
	delete(s.progress, name)
	return s
}

// Replicas returns the records of the CA's replicas, ordered by name.
func (r *Registry) Replicas() []*replica.Record {
	return slices.SortedFunc(maps.Values(r.pic.Load().replicas.byName), func(a, b *replica.Record) int { return strings.Compare(a.Name, b.Name) })
}

// Replica returns the record of the replica called name.
func (r *Registry) Replica(name string) (*replica.Record, bool) {
	rec, ok := r.pic.Load().replicas.byName[name]
	return rec, ok
}

// ReplicaOf returns the replica that issues, or has issued, under the authority
// with the given ID.
func (r *Registry) ReplicaOf(authority string) (*replica.Record, bool) {
	for _, rec := range r.pic.Load().replicas.byName {
		if rec.Holds(authority) {
			return rec, true
		}
	}
	return nil, false
}

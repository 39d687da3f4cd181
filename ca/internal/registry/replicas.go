// The replicas of the CA in the picture: who they are, and since when the keys
// that sign policy bundles are what they are.

package registry

import (
	"maps"
	"slices"
	"strings"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
)

// replicas is the part of the picture that is about them. There are few.
type replicas struct {
	byName map[string]*replica.Record // replaced, never written to
	// progress is what nested CAs said last, by name; replaced, never written to.
	progress map[string]*replica.Progress
	// living are the names of those that give a sign of life; replaced, never
	// written to.
	living map[string]bool
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

// alivePrefix begins the keys of the signs of life of replicas.
const alivePrefix = store.LeaderPrefix + aliveName

const aliveName = "alive-"

// AliveName is what a replica leads while it gives a sign of life.
func AliveName(replica string) string { return aliveName + replica }

func (s replicas) alive(name string, is bool) replicas {
	s.living = maps.Clone(s.living)
	if s.living == nil {
		s.living = make(map[string]bool)
	}
	s.living[name] = is
	return s
}

// unheard are the replicas that give no sign of life, but self. Nested CAs speak by
// their progress.
func (s replicas) unheard(self string) (names []string) {
	for name, rec := range s.byName {
		if name != self && rec.Realm == 0 && !s.living[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
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

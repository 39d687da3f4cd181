// What nested CAs have in common with this one, all of one picture.

package registry

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/trust"
)

// Shared is what a nested CA has in its store as it is in this one's.
type Shared struct {
	Revision    uint64
	Trust       *trust.Bundle
	Authorities rotation.Set
	Record      *replica.Record
}

// Shared returns what the replica called name shares; false where it is none, or
// nothing is published yet.
func (r *Registry) Shared(name string) (Shared, bool) {
	pic := r.pic.Load()
	rec, ok := pic.replicas.byName[name]
	return Shared{pic.revision, pic.trust, pic.authorities, rec}, ok && pic.trust != nil
}

// Progress is what the nested CA called name said last; nil for nothing.
func (r *Registry) Progress(name string) *replica.Progress {
	return r.pic.Load().replicas.progress[name]
}

// Subscribed says whether a stream of id's is open here.
func (r *Registry) Subscribed(id spiffeid.ID) bool {
	r.feeds.mu.Lock()
	defer r.feeds.mu.Unlock()
	return len(r.feeds.byAgent[id]) > 0
}

// HoldsRevocation says whether the record with the given key is there.
func (r *Registry) HoldsRevocation(key string) bool { return r.pic.Load().revocations.Holds(key) }

// RevocationsAfter returns the records above revision that live at now, and the
// revision of the picture that they are of.
func (r *Registry) RevocationsAfter(revision uint64, now time.Time) ([]*revocation.Record, uint64) {
	pic := r.pic.Load()
	return pic.revocations.After(revision, now), pic.revision
}

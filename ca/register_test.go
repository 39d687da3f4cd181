// What a replica that starts finds of itself in the store.

package ca

import (
	"errors"
	"testing"
	"time"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// Each of the things by which the store knows a replica is missed alone.
func TestReplicaThatTheStoreDoesNotKnowIsEvicted(t *testing.T) {
	p, _ := openParts(t)
	if err := p.checkRegistered(t.Context()); err != nil {
		t.Fatal(err)
	}
	rec, err := p.record(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	published, _, err := p.store.Get(t.Context(), trust.Key)
	if err != nil {
		t.Fatal(err)
	}
	otherKey, otherAuthority := *rec, *rec
	otherKey.JWTKeyID = "other"
	otherAuthority.Authorities = []replica.Authority{{ID: "other", NotAfter: time.Now().Add(time.Hour)}}
	put := func(r *replica.Record) store.Op {
		op, err := r.Put()
		if err != nil {
			t.Fatal(err)
		}
		return op
	}
	unpublished, err := trust.Without(published, rec.JWTKeyID)
	if err != nil {
		t.Fatal(err)
	}
	for name, op := range map[string]store.Op{
		"no record":                 store.Delete(replica.Prefix + rec.Name),
		"another JWT key":           put(&otherKey),
		"another authority":         put(&otherAuthority),
		"JWT key not in the bundle": store.Put(trust.Key, unpublished.Value),
	} {
		p.put(t, op)
		if err := p.checkRegistered(t.Context()); !errors.Is(err, errEvicted) {
			t.Errorf("%s: %v; want errEvicted", name, err)
		}
		p.put(t, put(rec), store.Put(trust.Key, published.Value))
		if err := p.checkRegistered(t.Context()); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
}

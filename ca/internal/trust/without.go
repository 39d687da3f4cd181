// Taking keys out of a stored trust bundle, and what is known of them, before
// there is a store for it.

package trust

import (
	"fmt"
	"time"

	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
)

// JWTKeys names the replica of each JWT key among the stored authorities of kv.
func JWTKeys(kv store.KV) (map[string]string, error) {
	set, err := rotation.Decode(kv.Value)
	if err != nil {
		return nil, err
	}
	replicas := make(map[string]string)
	for _, a := range set.All() {
		if a.Kind == rotation.JWT && a.State.Trusted() {
			replicas[a.ID] = a.Replica
		}
	}
	return replicas, nil
}

// AuthoritiesWithout returns the stored authorities of kv without the JWT keys
// of the named replicas.
func AuthoritiesWithout(kv store.KV, now time.Time, replicas ...string) (store.KV, error) {
	set, err := rotation.Decode(kv.Value)
	if err != nil {
		return store.KV{}, err
	}
	for _, name := range replicas {
		set = set.Evicted(name, now)
	}
	kv.Value, err = set.Encode()
	return kv, err
}

// Without returns the stored trust bundle of kv without the named JWT keys. Its
// sequence number stays: it is for a store that goes on in the next epoch,
// where Publish gives it another.
func Without(kv store.KV, jwtKeyIDs ...string) (store.KV, error) {
	b, err := Decode(kv)
	if err != nil {
		return store.KV{}, err
	}
	for _, kid := range jwtKeyIDs {
		b.Keys.RemoveJWTAuthority(kid)
	}
	if b.JWKS, err = b.Keys.Marshal(); err != nil {
		return store.KV{}, fmt.Errorf("encode the trust bundle: %w", err)
	}
	op, err := b.put()
	return store.KV{Key: kv.Key, Value: op.Value, ModRevision: kv.ModRevision}, err
}

// Taking keys out of a stored trust bundle before there is a store for it.

package trust

import (
	"fmt"

	"merlon.dev/ca/internal/store"
)

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

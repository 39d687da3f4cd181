// Replicas that a restore left out. What they had signed for the CA is signed
// anew at its next start; until then their records are kept aside.

package replica

import (
	"context"
	"fmt"
	"strings"

	"merlon.dev/ca/internal/store"
)

// FormerPrefix is where the store keeps the records of former replicas, by name.
const FormerPrefix = "former-replica/"

const formerPage = 100

// PutFormer returns the write that keeps r as a former replica.
func (r *Record) PutFormer() (store.Op, error) {
	op, err := r.Put()
	op.Key = FormerPrefix + r.Name
	return op, err
}

// Forget returns the transaction that removes the former replica r.
func (r *Record) Forget() (store.Cmp, store.Op) {
	key := FormerPrefix + r.Name
	return store.Cmp{Key: key, ModRevision: r.Revision}, store.Delete(key)
}

// Former reads the former replicas that are left.
func Former(ctx context.Context, st store.Store) (records []*Record, err error) {
	for after, more := "", true; more; {
		var kvs []store.KV
		if kvs, _, more, err = st.List(ctx, FormerPrefix, after, formerPage, 0); err != nil {
			return nil, fmt.Errorf("list the former replicas: %w", err)
		}
		for _, kv := range kvs {
			after = kv.Key
			kv.Key = Prefix + strings.TrimPrefix(kv.Key, FormerPrefix)
			rec, err := Decode(kv)
			if err != nil {
				return nil, err
			}
			records = append(records, rec)
		}
	}
	return records, nil
}

// Replica tokens: one replica of the CA, or one nested CA, once. What is stored of
// one carries the root's seal, since with a token comes an intermediate: who can
// write the store alone must not be able to make one.

package attest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"merlon.dev/ca/internal/store"
)

const (
	replicaKind = "mrt"
	nestedKind  = "mnt"
)

// ForNested says whether token is of the kind by which a nested CA joins.
func ForNested(token string) bool { return strings.HasPrefix(token, nestedKind+"-") }

// Sealer is the root's key; *upstream.Keys of the root holder has it.
type Sealer interface {
	Seal(statement []byte) ([]byte, error)
	Sealed(statement, seal []byte) bool
}

// CreateReplicaToken makes a token with which one CA can become the replica
// called name until expires.
func CreateReplicaToken(ctx context.Context, st store.Store, root Sealer, name string, expires time.Time) (string, error) {
	return storeToken(ctx, st, replicaKind, storedToken{Subject: name, ExpiresAt: expires.UTC()}, root.Seal)
}

// CreateNestedToken is CreateReplicaToken for the nested CA called name.
func CreateNestedToken(ctx context.Context, st store.Store, root Sealer, name string, expires time.Time) (string, error) {
	return storeToken(ctx, st, nestedKind, storedToken{Subject: name, ExpiresAt: expires.UTC()}, root.Seal)
}

// RedeemReplicaToken uses token up in the transaction that enroll prepares for
// the replica called name: of any number of simultaneous callers exactly one
// succeeds (SECURITY.md T6). It returns the revision of the transaction. An
// error of enroll ends it, and the token stays good.
func RedeemReplicaToken(ctx context.Context, st store.Store, root Sealer, token string, now time.Time, enroll func(name string) ([]store.Cmp, []store.Op, error)) (uint64, error) {
	kind := replicaKind
	if ForNested(token) {
		kind = nestedKind
	}
	for range maxAttempts {
		t, kv, err := findToken(ctx, st, kind, token, now)
		if err != nil {
			return 0, err
		}
		if !root.Sealed(t.statement(kv.Key), t.Seal) {
			return 0, ErrUnknownToken
		}
		cmps, ops, err := enroll(t.Subject)
		if err != nil {
			return 0, err
		}
		cmps = append(cmps, store.Cmp{Key: kv.Key, ModRevision: kv.ModRevision})
		res, err := st.Txn(ctx, cmps, append(ops, store.Delete(kv.Key)), nil)
		if err != nil {
			return 0, fmt.Errorf("use up a replica token: %w", err)
		}
		if res.Succeeded {
			return res.Revision, nil
		}
		// Either somebody used the token, which the next round finds, or what
		// enroll looked at has changed meanwhile.
	}
	return 0, errors.New("use up a replica token: others keep changing the trust bundle")
}

// statement is what the root seals of the token stored under key: all that is
// known of it.
func (t storedToken) statement(key string) []byte {
	return []byte(key + "\n" + t.Subject + "\n" + strconv.FormatInt(t.ExpiresAt.UnixNano(), 10))
}

// Replica tokens: one winner, and none without the root.

package attest

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/internal/store"
)

// sealer seals with a prefix, as good as any signature to the store.
type sealer string

func (s sealer) Seal(statement []byte) ([]byte, error) {
	return append([]byte(s), statement...), nil
}

func (s sealer) Sealed(statement, seal []byte) bool {
	return bytes.Equal(seal, append([]byte(s), statement...))
}

func enrollAs(st store.Store, t *testing.T) func(string) ([]store.Cmp, []store.Op, error) {
	return func(name string) ([]store.Cmp, []store.Op, error) {
		_, _, err := st.Get(t.Context(), "record/"+name)
		if err == nil {
			return nil, nil, errors.New("is there already")
		}
		return []store.Cmp{{Key: "record/" + name}}, []store.Op{store.Put("record/"+name, nil)}, nil
	}
}

// SECURITY.md T6, with all callers looking at the token first.
func TestOneOfManyRedeemsAReplicaToken(t *testing.T) {
	st := openStore(t)
	token, err := CreateReplicaToken(t.Context(), st, sealer("root"), "ca-2", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	// Each writes a record of its own: only the token is in the way.
	wantOneWinner(t, func() error {
		_, err := RedeemReplicaToken(t.Context(), st, sealer("root"), token, time.Now(), func(string) ([]store.Cmp, []store.Op, error) {
			return nil, nil, nil
		})
		return err
	})
}

// Who can write the store, and has no root key, lets no replica in: neither by a
// token of his own nor by another's that he makes out to a new name or time.
func TestReplicaTokenNeedsTheRootsSeal(t *testing.T) {
	st := openStore(t)
	now := time.Now()
	forged, err := CreateReplicaToken(t.Context(), st, sealer("forger"), "ca-2", now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := RedeemReplicaToken(t.Context(), st, sealer("root"), forged, now, enrollAs(st, t)); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("a forged token: %v; want ErrUnknownToken", err)
	}
	for what, change := range map[string][2]string{"name": {"ca-2", "ca-3"}, "time": {`"expires_at":"2`, `"expires_at":"3`}} {
		token, err := CreateReplicaToken(t.Context(), st, sealer("root"), "ca-2", now.Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		kv, _, err := st.Get(t.Context(), tokenKey(replicaKind, token))
		if err != nil {
			t.Fatal(err)
		}
		changed := strings.Replace(string(kv.Value), change[0], change[1], 1)
		if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put(kv.Key, []byte(changed))}, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := RedeemReplicaToken(t.Context(), st, sealer("root"), token, now, enrollAs(st, t)); !errors.Is(err, ErrUnknownToken) {
			t.Errorf("a token with another %s: %v; want ErrUnknownToken", what, err)
		}
	}
}

func TestReplicaTokenStaysGoodWhenNobodyIsEnrolled(t *testing.T) {
	st := openStore(t)
	token, err := CreateReplicaToken(t.Context(), st, sealer("root"), "ca-2", time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	if _, err := RedeemReplicaToken(t.Context(), st, sealer("root"), token, time.Now(), func(string) ([]store.Cmp, []store.Op, error) {
		return nil, nil, refused
	}); !errors.Is(err, refused) {
		t.Errorf("RedeemReplicaToken = %v; want what enroll says", err)
	}
	if _, err := redeem(t, st, token, time.Now()); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("as a join token: %v", err)
	}
	if _, err := RedeemReplicaToken(t.Context(), st, sealer("root"), token, time.Now(), enrollAs(st, t)); err != nil {
		t.Error(err)
	}
	if _, err := RedeemReplicaToken(t.Context(), st, sealer("root"), token, time.Now(), enrollAs(st, t)); !errors.Is(err, ErrUnknownToken) {
		t.Errorf("again: %v", err)
	}
}

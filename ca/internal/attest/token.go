// What tokens of all kinds have in common: 160 random bits that are shown once
// and stored only as a hash, so that who reads the store can use none of them.

package attest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/store"
)

// TokenPrefix is where the store keeps tokens of every kind.
const TokenPrefix = "token/"

// Reasons why a token is refused.
var (
	// ErrUnknownToken: never made, used already, or removed after its expiry.
	// These cannot be told apart: nothing is kept of a used token.
	ErrUnknownToken = errors.New("token is unknown or was used already")
	// ErrExpiredToken: too late.
	ErrExpiredToken = errors.New("token has expired")
	// ErrTokenScope: made for something else.
	ErrTokenScope = errors.New("token is for another policy bundle")
)

var secretEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

const (
	secretBytes   = 20
	maxTokenBytes = 128
)

type storedToken struct {
	Version   int       `json:"v"`
	Subject   string    `json:"subject"` // agent name, policy bundle, or replica
	ExpiresAt time.Time `json:"expires_at"`
	Seal      []byte    `json:"seal,omitempty"` // replica: the root's
}

// createToken stores the hash of a fresh secret and returns the secret.
func createToken(ctx context.Context, st store.Store, kind, subject string, expires time.Time) (string, error) {
	return storeToken(ctx, st, kind, storedToken{Subject: subject, ExpiresAt: expires.UTC()}, nil)
}

// storeToken stores t under the hash of a fresh secret, with seal's seal if
// that is given, and returns the secret.
func storeToken(ctx context.Context, st store.Store, kind string, t storedToken, seal func(statement []byte) ([]byte, error)) (string, error) {
	var b [secretBytes]byte
	rand.Read(b[:]) // never fails, see crypto/rand
	token := kind + "-" + strings.ToLower(secretEncoding.EncodeToString(b[:]))
	key := tokenKey(kind, token)
	t.Version = encodingVersion
	if seal != nil {
		var err error
		if t.Seal, err = seal(t.statement(key)); err != nil {
			return "", err
		}
	}
	value, err := json.Marshal(t)
	if err != nil {
		return "", fmt.Errorf("encode a token: %w", err)
	}
	granted, ends, err := approval.Join(ctx, "")
	if err != nil {
		return "", err
	}
	res, err := st.Txn(ctx, append(granted, store.Cmp{Key: key}), append(ends, store.Put(key, value)), nil)
	if err != nil {
		return "", fmt.Errorf("store a token: %w", err)
	}
	if !res.Succeeded && len(granted) > 0 {
		return "", approval.ErrEnded
	}
	if !res.Succeeded {
		return "", errors.New("store a token: the random generator repeats itself")
	}
	return token, nil
}

// findToken returns the live record of token and its revision.
func findToken(ctx context.Context, st store.Store, kind, token string, now time.Time) (storedToken, store.KV, error) {
	if len(token) > maxTokenBytes || !strings.HasPrefix(token, kind+"-") {
		return storedToken{}, store.KV{}, ErrUnknownToken
	}
	kv, _, err := st.Get(ctx, tokenKey(kind, token))
	if errors.Is(err, store.ErrNotFound) {
		return storedToken{}, store.KV{}, ErrUnknownToken
	}
	if err != nil {
		return storedToken{}, store.KV{}, fmt.Errorf("read a token: %w", err)
	}
	t, err := decodeToken(kv)
	if err != nil {
		return storedToken{}, store.KV{}, err
	}
	if !now.Before(t.ExpiresAt) {
		return storedToken{}, store.KV{}, ErrExpiredToken
	}
	return t, kv, nil
}

func decodeToken(kv store.KV) (storedToken, error) {
	var t storedToken
	if err := json.Unmarshal(kv.Value, &t); err != nil {
		return storedToken{}, fmt.Errorf("decode a token: %w", err)
	}
	if t.Version != encodingVersion {
		return storedToken{}, fmt.Errorf("decode a token: version %d is not known", t.Version)
	}
	return t, nil
}

// TokenExpired says whether the stored token of kv is past its end at now, so
// that it can be removed. What cannot be read is kept.
func TokenExpired(kv store.KV, now time.Time) bool {
	t, err := decodeToken(kv)
	return err == nil && !now.Before(t.ExpiresAt)
}

func tokenKey(kind, token string) string {
	sum := sha256.Sum256([]byte(token))
	return TokenPrefix + kind + "/" + hex.EncodeToString(sum[:])
}

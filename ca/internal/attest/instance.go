// What instance tokens and documents of clouds have in common. Every process on a
// machine can ask its cloud for one, so the first who shows one is the agent, and
// the instance attests again only after an operator has evicted it; and none is
// good twice.

package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"merlon.dev/ca/internal/oidc"
	"merlon.dev/ca/internal/store"
)

const (
	maxInstanceToken = 16 << 10
	// usedKind is that of the records of tokens and documents which somebody else
	// made and which were used here. They go when those have ended.
	usedKind = "used"
)

// ErrAttestedOnce is returned for an instance that has attested before.
var ErrAttestedOnce = errors.New("the instance has attested already, and any process on it could show the same: if it is to attest anew, merlon agent evict")

// ErrUsedEvidence is returned for what attested an instance before.
var ErrUsedEvidence = errors.New("the instance attested by this very token or document before: it needs another of its cloud's (EC2 makes one when the instance is stopped and started)")

// instanceClaims verifies a token by the keys of its cloud.
func instanceClaims(ctx context.Context, kind string, source *oidc.Source, token string, now time.Time) (map[string]any, error) {
	if token == "" || len(token) > maxInstanceToken {
		return nil, refused(kind, Malformed, "the token has %d bytes; want 1 to %d", len(token), maxInstanceToken)
	}
	if strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, refused(kind, Malformed, "the token has characters that no token has")
	}
	claims, err := source.Claims(ctx, token, now)
	if errors.Is(err, oidc.ErrUnavailable) {
		return nil, refused(kind, Unavailable, "the token is not verified: %v", err)
	}
	if err != nil {
		return nil, refused(kind, Untrusted, "the token is not one of the cloud for this CA: %v", err)
	}
	return claims, nil
}

// once marks n as proved by what is good once, and not at all after end.
func (n *Node) once(evidence []byte, end time.Time) *Node {
	sum := sha256.Sum256(evidence)
	n.tokenID, n.tokenEnd = hex.EncodeToString(sum[:]), end.Add(time.Minute)
	return n
}

// endOf is when a verified token ends.
func endOf(claims map[string]any) time.Time {
	exp, _ := claims["exp"].(float64)
	return time.Unix(int64(exp), 0)
}

// use prepares the record that n's evidence was used, which must not be there.
func (n *Node) use(ctx context.Context, st store.Store) ([]store.Cmp, []store.Op, error) {
	if n.tokenID == "" {
		return nil, nil, nil
	}
	key := TokenPrefix + usedKind + "/" + n.tokenID
	switch _, _, err := st.Get(ctx, key); {
	case err == nil:
		return nil, nil, ErrUsedEvidence
	case !errors.Is(err, store.ErrNotFound):
		return nil, nil, fmt.Errorf("read a used token: %w", err)
	}
	value, err := json.Marshal(storedToken{Version: encodingVersion, Subject: n.ID.String(), ExpiresAt: n.tokenEnd.UTC()})
	if err != nil {
		return nil, nil, fmt.Errorf("encode a used token: %w", err)
	}
	return []store.Cmp{{Key: key}}, []store.Op{store.Put(key, value)}, nil
}

// Join tokens: one node, once.

package attest

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
)

// JoinToken is the kind of evidence in an agent's record.
const JoinToken = "join_token"

const joinKind = "mjt"

// CreateJoinToken makes a token with which one node can become the agent
// called name until expires.
func CreateJoinToken(ctx context.Context, st store.Store, name string, expires time.Time) (string, error) {
	return createToken(ctx, st, joinKind, name, expires)
}

// RedeemJoinToken uses token up and makes its agent live, in one transaction:
// of any number of simultaneous callers exactly one succeeds (SECURITY.md T6).
// notAfter is the end of the SVID that the agent will get. It returns the
// agent with the revision of its record.
func RedeemJoinToken(ctx context.Context, st store.Store, td spiffeid.TrustDomain, token string, now, notAfter time.Time) (*Agent, error) {
	for range maxAttempts {
		t, kv, err := findToken(ctx, st, joinKind, token, now)
		if err != nil {
			return nil, err
		}
		id, err := entry.AgentID(td, t.Subject)
		if err != nil {
			return nil, err
		}
		a := &Agent{ID: id, Attestation: JoinToken, AttestedAt: now, NotAfter: notAfter}
		done, err := commit(ctx, st, a, []store.Cmp{{Key: kv.Key, ModRevision: kv.ModRevision}}, []store.Op{store.Delete(kv.Key)})
		if err != nil {
			return nil, fmt.Errorf("use up a join token: %w", err)
		}
		if done {
			return a, nil
		}
		// Either somebody used the token, which the next round finds, or the
		// agent's record changed meanwhile.
	}
	return nil, fmt.Errorf("use up a join token: others keep changing the agent's record")
}

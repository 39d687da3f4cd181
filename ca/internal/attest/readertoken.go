// Bundle-reader tokens: with one, software that has no SVID (a stock OPA)
// fetches one policy bundle, until the token expires.

package attest

import (
	"context"
	"time"

	"merlon.dev/ca/internal/store"
)

const readerKind = "mbr"

// CreateReaderToken makes a token that reads the policy bundle until expires.
func CreateReaderToken(ctx context.Context, st store.Store, policyBundle string, expires time.Time) (string, error) {
	return createToken(ctx, st, readerKind, policyBundle, expires)
}

// CheckReaderToken says why token does not open policyBundle: ErrUnknownToken,
// ErrExpiredToken, ErrTokenScope; any other error is the store's.
func CheckReaderToken(ctx context.Context, st store.Store, token, policyBundle string, now time.Time) error {
	t, _, err := findToken(ctx, st, readerKind, token, now)
	if err != nil {
		return err
	}
	if t.Subject != policyBundle {
		return ErrTokenScope
	}
	return nil
}

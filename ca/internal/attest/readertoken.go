// Bundle-reader tokens: with one, software that has no SVID (a stock OPA)
// fetches one policy bundle, until the token expires.

package attest

import (
	"context"
	"strings"
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
	t, err := FindReaderToken(ctx, st, token, now)
	if err == nil && t.PolicyBundle != policyBundle {
		return ErrTokenScope
	}
	return err
}

// ReaderToken is what is known of a live token. ID tells it from others, and does
// not help to guess it.
type ReaderToken struct{ PolicyBundle, ID string }

// FindReaderToken looks token up; the errors are ErrUnknownToken, ErrExpiredToken,
// and the store's.
func FindReaderToken(ctx context.Context, st store.Store, token string, now time.Time) (ReaderToken, error) {
	t, kv, err := findToken(ctx, st, readerKind, token, now)
	if err != nil {
		return ReaderToken{}, err
	}
	hash := kv.Key[strings.LastIndexByte(kv.Key, '/')+1:]
	return ReaderToken{PolicyBundle: t.Subject, ID: hash[:12]}, nil
}

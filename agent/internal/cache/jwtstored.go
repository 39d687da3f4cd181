// JWT-SVIDs on their way to the disk and back.

package cache

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"merlon.dev/sdk/svid"
)

// stored returns the tokens that have not expired, the one used last in front.
func (t *tokens) stored(now time.Time) (out []StoredJWT) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for el := t.order.Front(); el != nil; el = el.Next() {
		if held := el.Value.(*token); now.Before(held.notAfter) {
			out = append(out, StoredJWT{EntryID: held.entryID, Audience: held.verified.Audience, Token: held.text, RenewAt: held.renewAt})
		}
	}
	return out
}

// restoreJWTs takes up the tokens that still hold. c.mu is held.
func (c *Cache) restoreJWTs(ctx context.Context, kept []StoredJWT) {
	now := time.Now()
	for _, stored := range slices.Backward(kept) {
		made, err := c.reviveJWT(stored, now)
		if err != nil {
			c.log.LogAttrs(ctx, slog.LevelInfo, "JWT-SVID from the disk is not used", slog.String("entry_id", stored.EntryID), slog.Any("err", err))
			continue
		}
		_, generation := c.jwts.find(made.key, now)
		c.jwts.add(made, generation)
	}
}

// reviveJWT judges a token from the disk like one that the CA has just sent.
func (c *Cache) reviveJWT(stored StoredJWT, now time.Time) (*token, error) {
	e := c.entries[stored.EntryID]
	if e == nil || e.Expired(now) {
		return nil, fmt.Errorf("its entry is gone")
	}
	audience := slices.Compact(slices.Sorted(slices.Values(stored.Audience)))
	if len(audience) == 0 {
		return nil, fmt.Errorf("it has no audience")
	}
	parsed, err := svid.VerifyJWT(stored.Token, c.trust.Load().Bundle, audience[:1], now)
	if err != nil {
		return nil, err
	}
	if parsed.ID != e.SPIFFEID || !sameAudience(parsed.Audience, audience) {
		return nil, fmt.Errorf("it is of %s to %q", parsed.ID, parsed.Audience)
	}
	if _, revoked := c.revocations.Load().ConcerningJWT(parsed); revoked {
		return nil, fmt.Errorf("it is revoked")
	}
	return &token{
		key: tokenKey(e, audience), entryID: e.ID, text: stored.Token, verified: parsed,
		notAfter: parsed.Expiry, renewAt: stored.RenewAt,
	}, nil
}

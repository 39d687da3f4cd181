// The renewal of the agent's own SVID.

package caclient

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"time"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

// lookInterval is how often keepRenewed looks at the wall clock, by which SVIDs
// expire: timers stand still while a machine sleeps.
const lookInterval = 15 * time.Second

// keepRenewed renews the agent's own SVID at half of its life, and tries again
// until it has expired.
func (c *Client) keepRenewed(ctx context.Context, picture *cache.Cache) {
	failures := 0
	for {
		wait := time.Second // no SVID yet, or an expired one: Run sees to it
		own := c.own.Load()
		if own != nil && own.valid(time.Now()) {
			wait = min(max(time.Until(own.renewAt), 0), lookInterval)
		}
		if failures > 0 {
			wait = max(wait, retryIn(10+failures))
		}
		if c.rest(ctx, wait) != nil {
			return
		}
		now := time.Now()
		if held := c.own.Load(); held == nil || held != own || !held.valid(now) {
			failures = 0
			continue
		}
		if now.Before(own.renewAt) {
			continue
		}
		if err := c.renew(ctx, picture); err != nil {
			failures++
			c.cfg.Logger.LogAttrs(ctx, slog.LevelWarn, "agent's SVID not renewed",
				slog.Time("not_after", own.notAfter()), slog.Any("err", err))
			continue
		}
		failures = 0
	}
}

// rest pauses, unless the SVID is to be renewed sooner than was thought.
func (c *Client) rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-c.hurry:
	case <-t.C:
	}
	return nil
}

// againPause is how long a replacement is put off that a tainted authority
// signed, too: the replica has no other yet.
const againPause = 5 * time.Second

// replaceOwn plans the replacement of the agent's own SVID after from, if trust
// taints the authority that signed it.
func (c *Client) replaceOwn(trust *cache.Trust, from time.Time) {
	own := c.own.Load()
	if own == nil || !own.taintedBy(trust) {
		return
	}
	sooner := *own
	if at := cache.Within(from, trust.RenewSpread); at.Before(own.renewAt) {
		sooner.renewAt = at
	}
	if c.own.CompareAndSwap(own, &sooner) {
		signal(c.hurry)
	}
}

// taintedBy says whether trust taints an authority of the chain, of which the
// root is known by its ID alone.
func (o *ownSVID) taintedBy(trust *cache.Trust) bool {
	var authorities []string
	for _, cert := range o.Certificates {
		authorities = append(authorities, hex.EncodeToString(cert.AuthorityKeyId))
	}
	return trust.Taints(authorities)
}

// renew obtains a new SVID for the agent with a new key.
func (c *Client) renew(ctx context.Context, picture *cache.Cache) error {
	key, csr, err := c.successor.after(c.own.Load().SVID)
	if err != nil {
		return err
	}
	var answer *capb.RenewResponse
	err = c.links.call(ctx, func(ctx context.Context, node capb.NodeClient) error {
		answer, err = node.Renew(ctx, &capb.RenewRequest{Csr: csr})
		return err
	})
	if err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	return c.adopt(ctx, picture, answer.GetX509Svid(), answer.GetTrustBundle(), key)
}

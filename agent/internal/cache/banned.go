// A banned agent: the CA revokes everything that was issued through it, and sends
// it nothing any more, that revocation neither. So its agent makes the record
// itself, by the CA's word that it is banned, until the CA serves it again.

package cache

import (
	"context"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

// recordLife is how long SVIDs can live.
const recordLife = 24 * time.Hour

// Ban withdraws everything that was issued through agent, whose handle begins the
// serial numbers: what is held is not served any more, and whoever watches
// revocations cuts its peers of this node.
func (c *Cache) Ban(ctx context.Context, agent spiffeid.ID, handle uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ban != nil {
		return
	}
	c.ban = &svid.Revocation{
		AgentID: agent.String(), AgentHandle: handle, ExpiresAt: time.Now().Add(recordLife), Note: "the agent is banned",
	}
	c.log.LogAttrs(ctx, slog.LevelError, "the CA has banned this agent: nothing that was issued through it is served any more",
		slog.String("spiffe_id", agent.String()))
	c.revoke([]svid.Revocation{*c.ban})
}

// unban takes the record back: the CA has its own, which lets later SVIDs be.
// c.mu is held.
func (c *Cache) unban() {
	if c.ban == nil {
		return
	}
	var others []svid.Revocation
	for _, r := range c.revocations.Load().All() {
		if r.AgentID != c.ban.AgentID || r.Note != c.ban.Note || r.BeforeRevision != 0 {
			others = append(others, r)
		}
	}
	c.ban = nil
	c.replaceRevocations(others)
}

// What the agent remembers of its CA, so that a CA which was restored from an
// older backup, or set back, is noticed: the highest store revision, sequence
// number of a trust bundle and policy generation that it ever saw. And when it
// last heard from it, so that a restart makes no revocation look fresher. And
// under which opening of the CA's store it saw the revision: a store that was put
// back, and has been written to since, is told by that.
//
// The trust bundle and the policy generation are written when they change. The
// revision changes with everything; it is written at most every few seconds
// and at the end, and an agent that is killed remembers one from seconds ago.
// It is never ahead of what else is on disk: so an older copy of that, put
// back, is told by it.

package caclient

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

const (
	seenFile = "seen" // storedSeen
	// seenPause is the time between two writes of seenFile, and heardPause while
	// nothing but the time changes.
	seenPause  = 5 * time.Second
	heardPause = 30 * time.Second
)

// storedSeen is the form of seenFile.
type storedSeen struct {
	TrustDomain string    `json:"trust_domain"`
	Revision    uint64    `json:"revision"`
	Heard       time.Time `json:"heard,omitzero"`
	// Opening is that of Revision, or a later one.
	Opening []byte `json:"opening,omitempty"`
}

// seen is the highest of everything, for the CA.
func (c *Client) seen(picture *cache.Cache) *capb.Seen {
	seen := &capb.Seen{Revision: picture.Seen(), PolicyGeneration: c.cfg.PolicySeen(), Logs: c.logs.states()}
	seen.Opening = c.opening(seen.Revision)
	if trust := picture.Trust(); trust != nil {
		seen.TrustBundleSequence = trust.Sequence
	}
	return seen
}

// opening is the last that a CA named, asked for once revision is known: what was
// seen under this one must not look as if it were from an earlier one. So after a
// restart there is none for a revision that only the cache on the disk has.
func (c *Client) opening(revision uint64) []byte {
	switch last := c.opened.Load(); {
	case last != nil:
		return *last
	case revision <= c.remembered.Revision:
		return c.remembered.Opening
	}
	return nil
}

// noteOpening comes before what was sent under it is applied.
func (c *Client) noteOpening(opening []byte) {
	if len(opening) > 0 {
		c.opened.Store(&opening)
	}
}

// loadSeen returns what saveSeen wrote, zero when there is nothing.
func (c *Client) loadSeen() (stored storedSeen, err error) {
	content, err := c.cfg.DataDir.Read(context.Background(), seenFile)
	if err != nil || content == nil {
		return stored, err
	}
	return decodeSeen(content, c.cfg.TrustDomain.Name())
}

func decodeSeen(content []byte, trustDomain string) (stored storedSeen, err error) {
	if err := json.Unmarshal(content, &stored); err != nil {
		return storedSeen{}, fmt.Errorf("read %s: %w", seenFile, err)
	}
	if stored.TrustDomain != trustDomain {
		return storedSeen{}, fmt.Errorf("read %s: it is of trust domain %q, expected %q", seenFile, stored.TrustDomain, trustDomain)
	}
	return stored, nil
}

func (c *Client) saveSeen(seen storedSeen) error {
	content, err := json.Marshal(seen)
	if err != nil {
		return fmt.Errorf("encode the revision: %w", err)
	}
	return c.cfg.DataDir.Write(seenFile, content)
}

// Revision is the highest store revision that an earlier run wrote down.
func (c *Client) Revision() uint64 { return c.remembered.Revision }

// Recall gives picture what an earlier run wrote down.
func (c *Client) Recall(ctx context.Context, picture *cache.Cache) {
	if c.trust != nil {
		picture.SetTrust(ctx, c.trust)
	}
	picture.Remember(c.remembered.Revision, c.remembered.Heard)
}

// keepSeen writes down what grows, until ctx ends. It has a goroutine of its
// own: a slow disk holds up nothing.
func (c *Client) keepSeen(ctx context.Context, picture *cache.Cache) {
	beat := time.NewTicker(heardPause)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.sawMore:
		case <-beat.C:
		}
		for again := true; again; again = picture.Seen() > c.written.Revision { // the rest is not on disk yet
			c.WriteSeen(ctx, picture)
			if pause(ctx, seenPause) != nil {
				return
			}
		}
	}
}

// WriteSeen writes down what has grown since the last time. Run does it while it
// runs; its caller once more when everything else has ended.
func (c *Client) WriteSeen(ctx context.Context, picture *cache.Cache) {
	now := storedSeen{
		TrustDomain: c.cfg.TrustDomain.Name(), Heard: picture.Heard(),
		Revision: max(c.written.Revision, min(picture.Seen(), c.cfg.Durable())),
	}
	now.Opening = c.opening(now.Revision)
	if now.Revision == c.written.Revision && now.Heard.Sub(c.written.Heard) < heardPause {
		return
	}
	err := c.saveSeen(now)
	if err == nil {
		c.written = now
	} else if !c.seenFailing {
		c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "revision not saved", slog.Any("err", err))
	}
	c.seenFailing = err != nil
}

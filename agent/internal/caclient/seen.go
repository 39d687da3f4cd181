// What the agent remembers of its CA, so that a CA which was restored from an
// older backup, or set back, is noticed: the highest store revision, sequence
// number of a trust bundle and policy generation that it ever saw.
//
// The trust bundle and the policy generation are written when they change. The
// revision changes with everything; it is written at most every few seconds
// and at the end, and an agent that is killed remembers one from seconds ago.

package caclient

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/durable"
)

const (
	seenFile = "seen.json" // storedSeen
	// seenPause is the time between two writes of seenFile.
	seenPause = 5 * time.Second
)

// storedSeen is the form of seenFile.
type storedSeen struct {
	TrustDomain string `json:"trust_domain"`
	Revision    uint64 `json:"revision"`
}

// seen is the highest of everything, for the CA.
func (c *Client) seen(picture *cache.Cache) *capb.Seen {
	seen := &capb.Seen{Revision: picture.Seen(), PolicyGeneration: c.cfg.PolicySeen(), Logs: c.logs.states()}
	if trust := picture.Trust(); trust != nil {
		seen.TrustBundleSequence = trust.Sequence
	}
	return seen
}

// loadSeen returns the revision from the disk, 0 when there is none. An
// unreadable file is an error, because what it forgets could be replayed.
func (c *Client) loadSeen() (revision uint64, err error) {
	content, err := ReadFile(c.cfg.DataDir, seenFile)
	if err != nil || content == nil {
		return 0, err
	}
	path := filepath.Join(c.cfg.DataDir, seenFile)
	var stored storedSeen
	if err := json.Unmarshal(content, &stored); err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	if stored.TrustDomain != c.cfg.TrustDomain.Name() {
		return 0, fmt.Errorf("read %s: it is of trust domain %q, expected %q", path, stored.TrustDomain, c.cfg.TrustDomain.Name())
	}
	return stored.Revision, nil
}

func (c *Client) saveSeen(revision uint64) error {
	content, err := json.Marshal(storedSeen{TrustDomain: c.cfg.TrustDomain.Name(), Revision: revision})
	if err != nil {
		return fmt.Errorf("encode the revision: %w", err)
	}
	return durable.WriteFile(c.cfg.DataDir, seenFile, content)
}

// keepSeen writes the revision down as it grows, until ctx ends and then once
// more. It has a goroutine of its own: a slow disk holds up nothing.
func (c *Client) keepSeen(ctx context.Context, picture *cache.Cache, saved uint64) {
	failing := false
	save := func() {
		revision := picture.Seen()
		if revision <= saved {
			return
		}
		if err := c.saveSeen(revision); err != nil {
			if !failing {
				c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "revision not saved", slog.Any("err", err))
			}
			failing = true
			return
		}
		saved, failing = revision, false
	}
	defer save()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.sawMore:
		}
		save()
		if pause(ctx, seenPause) != nil {
			return
		}
	}
}

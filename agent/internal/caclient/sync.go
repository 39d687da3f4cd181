// The Sync stream: what the CA pushes comes in, acknowledgements go out, and
// silence is noticed. And the renewal of the agent's own SVID.

package caclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

const (
	// silence is how long a stream may say nothing: the CA speaks at least
	// every 15 s, so two words are missing by then.
	silence = 35 * time.Second
	// clockAlarm is how far the CA's clock may be off before the log says so
	// (SECURITY.md T41).
	clockAlarm = 30 * time.Second
	// ackPause keeps acknowledgements from following each other too closely.
	ackPause = 20 * time.Millisecond
	// lookInterval is how often keepRenewed looks at the wall clock, by which
	// SVIDs expire: timers stand still while a machine sleeps.
	lookInterval = 15 * time.Second
)

var (
	errRenewed = errors.New("the agent has a new SVID")
	errSilent  = fmt.Errorf("the CA has said nothing for %v", silence)
)

// follow applies one Sync stream to picture until it ends, the CA falls silent
// or the agent has a new SVID to connect with.
func (c *Client) follow(ctx context.Context, picture *cache.Cache, node capb.NodeClient) (heard bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watchdog := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer watchdog.Stop()
	stream, err := node.Sync(ctx)
	if err != nil {
		return false, fmt.Errorf("open the Sync stream: %w", err)
	}
	first := c.ack(picture)
	resume := uint64(0)
	if state := picture.State(); state.Synced {
		resume = state.Revision
	}
	if err := stream.Send(&capb.SyncRequest{ResumeRevision: resume, Ack: first}); err != nil {
		// io.EOF; Recv says why.
		_, err = stream.Recv()
		return false, fmt.Errorf("open the Sync stream: %w", err)
	}
	defer picture.Disconnected()
	var sending sync.WaitGroup
	defer sending.Wait()
	defer cancel(nil)
	sending.Go(func() { c.sendAcks(ctx, cancel, picture, stream, first) })
	for {
		m, err := stream.Recv()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return heard, fmt.Errorf("follow the Sync stream: %w", err)
		}
		watchdog.Reset(silence)
		if !heard {
			heard = true
			c.connects.Inc()
			c.cfg.Logger.LogAttrs(ctx, slog.LevelInfo, "connected to the CA", slog.String("address", c.cfg.Address))
			c.checkClock(ctx, m)
		}
		if err := c.apply(ctx, picture, m); err != nil {
			return heard, fmt.Errorf("apply what the CA sent: %w", err)
		}
	}
}

func (c *Client) apply(ctx context.Context, picture *cache.Cache, m *capb.SyncResponse) error {
	before := picture.Trust()
	if err := picture.Apply(ctx, m); err != nil {
		return err
	}
	if trust := picture.Trust(); trust != before {
		if err := c.saveTrust(trust); err != nil {
			// It is in use; only a restart would not have it.
			c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "trust bundle not saved", slog.Any("err", err))
		}
	}
	if pb := m.GetPolicyBundle(); pb != nil {
		c.cfg.OnPolicyBundle(pb)
	}
	if m.GetSynced() {
		signal(c.ackAgain)
	}
	return nil
}

func (c *Client) checkClock(ctx context.Context, m *capb.SyncResponse) {
	if m.GetSentAt() == nil {
		return
	}
	if off := time.Since(m.GetSentAt().AsTime()); off.Abs() > clockAlarm {
		c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "clocks of CA and node differ", slog.Duration("ahead", off))
	}
}

func (c *Client) ack(picture *cache.Cache) *capb.SyncAck {
	revision, sequence := picture.Ack()
	return &capb.SyncAck{Revision: revision, TrustBundleSequence: sequence, PolicyGeneration: c.cfg.PolicyGeneration()}
}

// sendAcks tells the CA what the node serves, whenever that grew, and ends the
// stream when the agent has a new SVID.
func (c *Client) sendAcks(ctx context.Context, cancel context.CancelCauseFunc, picture *cache.Cache, stream capb.Node_SyncClient, last *capb.SyncAck) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.gotOwn:
			cancel(errRenewed)
			return
		case <-picture.Served():
		case <-c.ackAgain:
		}
		now := c.ack(picture)
		if now.Revision == last.Revision && now.TrustBundleSequence == last.TrustBundleSequence && now.PolicyGeneration == last.PolicyGeneration {
			continue
		}
		if stream.Send(&capb.SyncRequest{Ack: now}) != nil {
			return // Recv says why
		}
		last = now
		if pause(ctx, ackPause) != nil {
			return
		}
	}
}

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
		if pause(ctx, wait) != nil {
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

// renew obtains a new SVID for the agent with a new key.
func (c *Client) renew(ctx context.Context, picture *cache.Cache) error {
	key, csr, err := newKey()
	if err != nil {
		return err
	}
	var answer *capb.RenewResponse
	err = c.call(ctx, func(ctx context.Context, node capb.NodeClient) error {
		answer, err = node.Renew(ctx, &capb.RenewRequest{Csr: csr})
		return err
	})
	if err != nil {
		return fmt.Errorf("renew: %w", err)
	}
	return c.adopt(ctx, picture, answer.GetX509Svid(), answer.GetTrustBundle(), key)
}

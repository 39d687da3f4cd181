// What the CA sends becomes the node's picture: one whole update at a time,
// and never an older one in the place of a newer.

package cache

import (
	"context"
	"errors"
	"fmt"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// epochBits is how many revisions an epoch has: a store that was restored from
// a backup goes on in the next epoch, and nothing that was known of the one
// before can be resumed from.
const epochBits = 32

func epoch(revision uint64) uint64 { return revision >> epochBits }

// ErrNewEpoch says that the CA's store was restored since the last listing;
// the next Resume asks for a full one.
var ErrNewEpoch = errors.New("the CA's store was restored from a backup: asking for a full listing")

// ErrBehind says that the CA is of no use now, without a fault of its own: it
// would say the same of itself.
var ErrBehind = errors.New("the CA cannot reach its store, and what it knows is older than what this node has seen")

// OlderError is the refusal of a CA that knows less than the node has seen: its
// store was set back, or somebody replays an old one.
type OlderError struct {
	Revision uint64 // of the CA
	Seen     uint64 // by this node
}

// Error says what that means.
func (e *OlderError) Error() string {
	return fmt.Sprintf("the CA is at store revision %d, but this node has seen revision %d: its store was restored from an older backup, or set back; what is held stays in use", e.Revision, e.Seen)
}

// update is what the stream has sent since it last said synced. It takes
// effect as a whole: half a listing could give a workload another identity,
// and only the end says whether it is older than what is held.
type update struct {
	listing     bool // it is everything: what it does not repeat is gone
	messages    []*capb.SyncResponse
	revocations []svid.Revocation
}

// Apply takes one message of the Sync stream. Messages must come in order, by
// one goroutine. An entry that makes no sense is logged and left out. Trust
// bundles and revocations count at once, all else when the CA says synced. On
// error the stream is of no use any more, and nothing that is held was given
// up; *OlderError and ErrNewEpoch say why.
func (c *Cache) Apply(ctx context.Context, m *capb.SyncResponse) error {
	now := time.Now()
	trust, err := c.parseTrust(m.GetTrustBundle())
	if err != nil {
		return err
	}
	revocations := c.parseRevocations(ctx, m.GetRevocations())

	c.mu.Lock()
	defer c.mu.Unlock()
	c.swapTrust(ctx, trust)
	c.revoke(revocations)
	if m.GetReset_() {
		c.coming = update{listing: true}
	}
	u := &c.coming
	u.messages = append(u.messages, m)
	u.revocations = append(u.revocations, revocations...)
	if !m.GetSynced() {
		return nil
	}
	whole := *u
	c.coming = update{}
	// What a nested CA passes on is as old as what it heard last.
	return c.complete(ctx, whole, m.GetRevision(), m.GetStale(), now.Add(-max(m.GetUpstreamAge().AsDuration(), 0)))
}

// complete lets a whole update take effect, which is as of asOf. c.mu is held.
func (c *Cache) complete(ctx context.Context, u update, revision uint64, stale bool, asOf time.Time) error {
	news, err := c.weigh(u, revision, stale)
	if err != nil {
		return err
	}
	if news {
		if !stale { // such a replica may not have heard of it
			c.unban()
		}
		c.take(ctx, u)
		c.revision, c.relist = revision, false
		c.seen = max(c.seen, revision)
		signal(c.changed)
	}
	// A replica that is cut off from its store, or behind, does not know what
	// was revoked since.
	if news && !stale && asOf.After(c.Heard()) {
		c.heard.Store(&asOf)
	}
	before := c.current()
	first := !c.synced
	c.synced, c.connected, c.stale = true, true, stale
	if first || c.current() && !before {
		c.notifyAll()
	}
	return nil
}

// weigh says whether an update is news, or else what is held is newer. c.mu is
// held.
func (c *Cache) weigh(u update, revision uint64, stale bool) (news bool, err error) {
	switch {
	case u.listing && revision >= c.seen:
		return true, nil
	case u.listing && stale:
		return false, ErrBehind
	case u.listing:
		return false, &OlderError{Revision: revision, Seen: c.seen}
	case epoch(revision) > epoch(c.revision) && c.synced:
		c.relist = true
		return false, ErrNewEpoch
	case epoch(revision) < epoch(c.revision):
		return false, &OlderError{Revision: revision, Seen: c.seen}
	default:
		// Below what is held is a replica that has not caught up: everything in
		// it is known here, and may have been deleted again.
		return revision >= c.revision, nil
	}
}

// take changes entries and revocations. c.mu is held.
func (c *Cache) take(ctx context.Context, u update) {
	listed := map[string]struct{}{}
	for _, m := range u.messages {
		for _, pb := range m.GetEntries() {
			if c.put(ctx, pb) {
				listed[pb.GetEntryId()] = struct{}{}
			}
		}
		for _, id := range m.GetRemovedEntryIds() {
			c.remove(id)
			delete(listed, id)
		}
	}
	c.federate(ctx, u)
	if !u.listing {
		return
	}
	for id := range c.entries {
		if _, ok := listed[id]; !ok {
			c.remove(id)
		}
	}
	c.replaceRevocations(u.revocations)
}

// federate takes the trust bundles of other trust domains: those that an update
// names are all there are. A listing that names none is of a CA that knows none.
// c.mu is held.
func (c *Cache) federate(ctx context.Context, u update) {
	told := u.listing
	var all []*capb.TrustBundle
	for _, m := range u.messages {
		told = told || m.GetFederatedBundles() != nil
		all = append(all, m.GetFederatedBundles().GetTrustBundles()...)
	}
	if told {
		c.takeFederated(ctx, all)
	}
}

// current says whether what is held is everything that the CA knows, so that
// none means that there is none. c.mu is held.
func (c *Cache) current() bool { return c.synced && c.connected && !c.stale }

// Resume is the revision that a new stream goes on from; 0 asks for a full
// listing.
func (c *Cache) Resume() uint64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.synced || c.relist {
		return 0
	}
	return c.revision
}

// Remember tells the highest revision that this node saw before it was
// restarted, and when it last held everything that the CA knew.
func (c *Cache) Remember(seen uint64, heard time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = max(c.seen, seen)
	if now := time.Now(); heard.After(now) {
		heard = now // the clock was put back
	}
	if heard.After(c.Heard()) {
		c.heard.Store(&heard)
	}
}

// Seen is the highest revision that this node has ever seen.
func (c *Cache) Seen() uint64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.seen
}

// Disconnected says that the Sync stream ended. What is held stays; that a
// workload has no identity is not certain any more.
func (c *Cache) Disconnected() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connected, c.stale = false, false
	c.coming = update{}
}

// The trust bundle of the own trust domain, and revocations.

package cache

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// Trust is one version of the own trust bundle, in every form that it is
// served in. It is immutable.
type Trust struct {
	Sequence uint64
	// Bundle is not to be changed.
	Bundle *spiffebundle.Bundle
	// X509 holds the X.509 authorities, DER, one after the other.
	X509 []byte
	// JWKS holds the JWT authorities only (Workload API §6.2.2).
	JWKS []byte
	// Document is the whole bundle as the CA sent it.
	Document []byte
	// Tainted are the IDs of the keys whose SVIDs are to be replaced, within
	// RenewSpread.
	Tainted     []string
	RenewSpread time.Duration
}

// Taints says whether any of the authorities, by ID, is tainted.
func (t *Trust) Taints(authorityIDs []string) bool {
	return t != nil && slices.ContainsFunc(authorityIDs, func(id string) bool { return slices.Contains(t.Tainted, id) })
}

// Ended says whether every root has ended, so that the bundle vouches for
// nobody any more.
func (t *Trust) Ended(now time.Time) bool {
	return !slices.ContainsFunc(t.Bundle.X509Authorities(), func(root *x509.Certificate) bool { return !now.After(root.NotAfter) })
}

// ParseTrust reads the trust bundle that the CA sent for its trust domain. It
// must have at least one X.509 authority: an empty one would distrust
// everybody, the CA included, and could never be replaced.
func ParseTrust(pb *capb.TrustBundle, trustDomain string) (*Trust, error) {
	if pb.GetTrustDomain() != trustDomain {
		return nil, fmt.Errorf("trust bundle is of trust domain %q, expected %q", pb.GetTrustDomain(), trustDomain)
	}
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil {
		return nil, err
	}
	b, err := spiffebundle.Parse(td, pb.GetJwks())
	if err != nil {
		return nil, fmt.Errorf("parse trust bundle: %w", err)
	}
	t := &Trust{
		Sequence: pb.GetSequence(), Bundle: b, Document: pb.GetJwks(),
		Tainted: pb.GetTaintedAuthorityIds(), RenewSpread: min(max(pb.GetRenewSpread().AsDuration(), 0), maxSpread),
	}
	for _, cert := range b.X509Authorities() {
		t.X509 = append(t.X509, cert.Raw...)
	}
	if len(t.X509) == 0 {
		return nil, fmt.Errorf("trust bundle %d of %s has no X.509 authority", t.Sequence, trustDomain)
	}
	if t.JWKS, err = spiffebundle.FromJWTAuthorities(td, b.JWTAuthorities()).Marshal(); err != nil {
		return nil, fmt.Errorf("encode JWT authorities: %w", err)
	}
	return t, nil
}

// maxSpread keeps what a CA says from putting a replacement off.
const maxSpread = time.Minute

func (c *Cache) parseTrust(pb *capb.TrustBundle) (*Trust, error) {
	if pb == nil {
		return nil, nil
	}
	return ParseTrust(pb, c.td.Name())
}

// SetTrust installs a trust bundle that did not come with Sync: from the disk,
// or with the agent's own SVID.
func (c *Cache) SetTrust(ctx context.Context, t *Trust) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.swapTrust(ctx, t)
}

// Trust returns the trust bundle, or nil before the first.
func (c *Cache) Trust() *Trust { return c.trust.Load() }

// swapTrust replaces the trust bundle by a newer one. c.mu is held.
func (c *Cache) swapTrust(ctx context.Context, t *Trust) {
	if t == nil {
		return
	}
	if held := c.trust.Load(); held != nil {
		if t.Sequence < held.Sequence {
			c.log.LogAttrs(ctx, slog.LevelError, "older trust bundle refused",
				slog.Uint64("sequence", t.Sequence), slog.Uint64("held", held.Sequence))
			return
		}
		if t.Sequence == held.Sequence {
			return
		}
		if !c.servesTainted(held) {
			c.clean = held.Sequence
		}
	}
	c.trust.Store(t)
	c.jwts.forgetAll()
	c.replaceTainted(t)
	c.log.LogAttrs(ctx, slog.LevelInfo, "trust bundle changed", slog.Uint64("sequence", t.Sequence))
	c.notifyAll()
}

// Revocations returns the live records. The set is immutable.
func (c *Cache) Revocations() *svid.Revocations { return c.revocations.Load() }

// parseRevocations reads what the CA pushed. A record that makes no sense is
// logged and left out: it concerns nothing.
func (c *Cache) parseRevocations(ctx context.Context, pbs []*capb.Revocation) []svid.Revocation {
	out := make([]svid.Revocation, 0, len(pbs))
	for _, pb := range pbs {
		r := svid.Revocation{
			SPIFFEID: pb.GetSpiffeId(), AgentID: pb.GetAgentId(),
			AuthorityID: pb.GetAuthorityId(), Serial: pb.GetSerial(),
			AgentHandle: pb.GetAgentHandle(), BeforeRevision: pb.GetBeforeRevision(), Realm: pb.GetRealm(), Note: pb.GetNote(),
		}
		if t := pb.GetExpiresAt(); t != nil {
			r.ExpiresAt = t.AsTime()
		}
		if err := r.Validate(); err != nil {
			c.log.LogAttrs(ctx, slog.LevelError, "revocation from the CA refused", slog.Any("err", err))
			continue
		}
		out = append(out, r)
	}
	return out
}

// revoke adds records. c.mu is held.
func (c *Cache) revoke(added []svid.Revocation) {
	if len(added) == 0 {
		return
	}
	all := c.revocations.Load().With(added...)
	if now := time.Now(); now.Sub(c.pruned) >= pruneEvery {
		all, c.pruned = all.Prune(svid.Earliest(c.begun, now)), now
	}
	c.revocations.Store(all)
	c.feed.add(added)
	c.dropRevoked(svid.NewRevocations(added)) // what is held has been held against the others
	signal(c.changed)
}

// replaceRevocations makes all the whole set. c.mu is held.
func (c *Cache) replaceRevocations(all []svid.Revocation) {
	set := svid.NewRevocations(all).Prune(svid.Earliest(c.begun, time.Now()))
	c.revocations.Store(set)
	c.feed.reset()
	c.dropRevoked(set)
}

// dropRevoked stops serving SVIDs that set concerns, and orders new ones where the entry
// still stands. c.mu is held.
func (c *Cache) dropRevoked(set *svid.Revocations) {
	c.jwts.forgetRevoked(set)
	for _, sl := range c.slots {
		if sl.svid == nil {
			continue
		}
		if _, revoked := set.Concerning(sl.svid.Peer); revoked {
			sl.withdraw()
			c.turn(sl)
		}
	}
}

// pruneEvery is how often revocations are looked through for such as concern nobody
// any more.
const pruneEvery = time.Minute

// feed numbers revocations in the order in which they came, so that a watcher
// gets what it has not seen.
type feed struct {
	changed chan struct{} // closed at the next change
	epoch   uint64        // rises when everything must be sent again
	first   int           // number of the first of records
	records []svid.Revocation
}

// maxFeed is how many records the feed keeps. A watcher that is further behind gets
// everything again.
const maxFeed = 4096

func newFeed() feed { return feed{changed: make(chan struct{}), epoch: 1} }

func (f *feed) add(records []svid.Revocation) {
	f.records = append(f.records, records...)
	if over := len(f.records) - maxFeed; over > maxFeed { // not for each record
		f.records = slices.Clone(f.records[over:])
		f.first += over
	}
	f.wake()
}

// reset makes every watcher read the whole set again.
func (f *feed) reset() {
	f.epoch++
	f.first, f.records = 0, nil
	f.wake()
}

func (f *feed) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// Cursor is how far a watcher of revocations has read. The zero value has read
// nothing.
type Cursor struct {
	epoch uint64
	read  int
}

// RevocationsSince returns the records after the cursor, or all live ones and
// reset, the new cursor, and a channel that is closed when there are more.
func (c *Cache) RevocationsSince(cur Cursor) (records []svid.Revocation, reset bool, next Cursor, more <-chan struct{}) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	next = Cursor{epoch: c.feed.epoch, read: c.feed.first + len(c.feed.records)}
	if cur.epoch != c.feed.epoch || cur.read < c.feed.first {
		return c.revocations.Load().All(), true, next, c.feed.changed
	}
	return c.feed.records[cur.read-c.feed.first:], false, next, c.feed.changed
}

// Heard returns when the node last held everything that the CA knew, by a
// message of a CA that reaches its store; zero for never.
func (c *Cache) Heard() time.Time {
	if t := c.heard.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// Package cache is the node's picture of what it may hold: the registration
// entries that the CA pushed, its revocations and trust bundle, and the SVIDs
// that the node's workloads use now. It decides which identities a workload
// has, keeps their SVIDs fresh, and wakes exactly the streams that a change
// concerns.
package cache

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/agent/internal/workload"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// Authority signs for this node: the CA, at the other end of a network.
// Errors carry gRPC codes. Implementations are safe for concurrent use.
type Authority interface {
	// Sign answers every item, in order.
	Sign(ctx context.Context, items []*capb.SignItem) ([]*capb.SignResult, error)
	// SignJWT answers every item, in order.
	SignJWT(ctx context.Context, items []*capb.SignJWTItem) ([]*capb.SignJWTResult, error)
}

// Options are what a Cache needs. All fields but OnIdentity are required.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Authority   Authority
	// OnIdentity is called, and must not block, with the SPIFFE ID of each entry that
	// comes or changes.
	OnIdentity func(id spiffeid.ID)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// Cache is safe for concurrent use. Use New, then Run.
type Cache struct {
	td        spiffeid.TrustDomain
	authority Authority
	onID      func(spiffeid.ID)
	log       *slog.Logger
	metrics   metrics
	jwts      tokens
	asking    *jwtQueue

	trust       atomic.Pointer[Trust]            // nil before the first trust bundle
	revocations atomic.Pointer[svid.Revocations] // never nil
	heard       atomic.Pointer[time.Time]        // nil: never
	wake        chan struct{}                    // the queue has work; capacity 1
	served      chan struct{}                    // Ack may have grown; capacity 1
	changed     chan struct{}                    // Snapshot would differ; capacity 1

	mu sync.RWMutex
	// guarded by mu
	entries   map[string]*Entry
	names     names
	federated map[string]*Federated // by name of the trust domain; replaced, never written to
	index     index
	subs      map[*Subscription]struct{}
	bySel     map[string]map[*Subscription]struct{}
	blind     map[workload.Kinds]map[*Subscription]struct{} // kind → streams of which nothing of it was read
	behind    map[uint64]int                                // trust bundle sequence → streams that were sent it last
	slots     map[slotKey]*slot
	slotsOf   map[string]map[*slot]struct{} // by entry ID
	kept      map[string]StoredSVID         // from the disk, by entry ID; not looked at yet
	queue     []*slot
	returns   uint64 // how often there was a CA to ask again
	feed      feed
	coming    update           // what is not complete yet
	revision  uint64           // everything up to here is held
	seen      uint64           // the highest revision ever, also before a restart
	clean     uint64           // the last trust bundle, before this one, of which nothing tainted was served
	relist    bool             // what is held cannot be resumed from
	synced    bool             // a full listing was completed, ever, or taken from the disk
	connected bool             // the CA's stream is open and has said synced
	stale     bool             // … by a replica that cannot reach its store
	ban       *svid.Revocation // by the CA's word, that it serves this node no more
	begun     time.Time        // when this was made
	pruned    time.Time        // when revocations were looked through last
	expiries  map[string]*time.Timer
	closed    bool
}

// New returns an empty Cache.
func New(o Options) *Cache {
	c := &Cache{
		td: o.TrustDomain, authority: o.Authority, onID: o.OnIdentity, log: o.Logger,
		wake: make(chan struct{}, 1), served: make(chan struct{}, 1), changed: make(chan struct{}, 1),
		entries: map[string]*Entry{}, names: newNames(), index: newIndex(),
		subs: map[*Subscription]struct{}{}, bySel: map[string]map[*Subscription]struct{}{}, blind: map[workload.Kinds]map[*Subscription]struct{}{},
		behind: map[uint64]int{}, slots: map[slotKey]*slot{}, slotsOf: map[string]map[*slot]struct{}{}, kept: map[string]StoredSVID{}, expiries: map[string]*time.Timer{},
		begun: time.Now(), feed: newFeed(), jwts: newTokens(), asking: &jwtQueue{authority: o.Authority},
	}
	if c.onID == nil {
		c.onID = func(spiffeid.ID) {}
	}
	c.revocations.Store(svid.NewRevocations(nil))
	c.metrics = newMetrics(o.Registerer, c)
	return c
}

// State is how well the picture is known to agree with the CA's.
type State struct {
	Synced    bool      // everything was received at least once, maybe before a restart
	Connected bool      // and the CA's stream is open
	Stale     bool      // but the CA cannot reach its store: no changes arrive
	Revision  uint64    // everything up to this store revision is held
	Heard     time.Time // when this was everything that the CA knew; zero for never
	Entries   int
	Streams   int
}

// State describes the Cache.
func (c *Cache) State() State {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return State{
		Synced: c.synced, Connected: c.connected, Stale: c.stale, Revision: c.revision, Heard: c.Heard(),
		Entries: len(c.entries), Streams: len(c.subs),
	}
}

// Identities are the SPIFFE IDs of the entries that hold at now, sorted. The caller must
// not write to it.
func (c *Cache) Identities(now time.Time) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clip(c.names.at(now))
}

// Wants are the kinds of selectors that some entry of this node asks for.
func (c *Cache) Wants() workload.Kinds {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.index.wants()
}

// Entitled returns the entries that the proof satisfies, in their order, and
// whether it is everything: only then does none mean that there is none.
func (c *Cache) Entitled(proof workload.Proof) (entries []*Entry, current bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.match(proof.Selectors, time.Now()), c.current() && c.index.unread(proof) == 0
}

// match returns the entries that proved (sorted) satisfies: none before the
// first listing is complete, half of which could give a workload another
// default identity, or one identity where it has two. c.mu is held.
func (c *Cache) match(proved []string, now time.Time) []*Entry {
	if !c.synced {
		return nil
	}
	return c.index.match(proved, now)
}

// put adds or replaces an entry, and says whether it holds. c.mu is held.
func (c *Cache) put(ctx context.Context, pb *capb.Entry) bool {
	e, err := parseEntry(pb, c.td)
	if err != nil {
		c.log.LogAttrs(ctx, slog.LevelError, "entry from the CA refused",
			slog.String("entry_id", pb.GetEntryId()), slog.Any("err", err))
		// What was held under this ID is not valid any more either.
		c.remove(pb.GetEntryId())
		return false
	}
	old := c.entries[e.ID]
	if old != nil {
		if old.Revision == e.Revision && e.Revision != 0 {
			return true // repeated by a listing
		}
		c.index.remove(old)
		c.names.remove(old)
	}
	c.entries[e.ID] = e
	c.index.add(e)
	c.names.add(e)
	c.jwts.forgetEntry(e.ID)
	c.watchExpiry(e)
	c.entryChanged(old, e)
	if old != nil {
		c.notifyMatching(old)
	}
	c.notifyMatching(e)
	c.onID(e.SPIFFEID)
	return true
}

// remove forgets an entry and its SVIDs. c.mu is held.
func (c *Cache) remove(id string) {
	e := c.entries[id]
	if e == nil {
		return
	}
	delete(c.entries, id)
	c.index.remove(e)
	c.names.remove(e)
	if t := c.expiries[id]; t != nil {
		t.Stop()
		delete(c.expiries, id)
	}
	c.jwts.forgetEntry(id)
	c.dropSlots(id)
	c.notifyMatching(e)
}

// watchExpiry wakes the streams of an entry when it expires. c.mu is held.
func (c *Cache) watchExpiry(e *Entry) {
	if t := c.expiries[e.ID]; t != nil {
		t.Stop()
		delete(c.expiries, e.ID)
	}
	if e.ExpiresAt.IsZero() || c.closed {
		return
	}
	c.expiries[e.ID] = time.AfterFunc(time.Until(e.ExpiresAt), func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.entries[e.ID] != e || c.closed {
			return
		}
		c.expired(e)
	})
}

// expired takes away what e gave. c.mu is held.
func (c *Cache) expired(e *Entry) {
	if t := c.expiries[e.ID]; t != nil {
		t.Stop()
		delete(c.expiries, e.ID)
	}
	c.jwts.forgetEntry(e.ID)
	c.dropSlots(e.ID)
	c.notifyMatching(e)
	signal(c.changed)
}

// Package registry is the CA's picture of its store in memory, kept current by
// one watch: entries, agents, revocations, the trust bundle and the heads of
// the policy bundles, all as of one revision. Issuance looks entries up here
// and learns the revision for the serial number; every Sync stream learns here
// what changed for its node. A change costs what it changes, not what there is.
package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

// EntryPrefix is where the store keeps registration entries, by ID.
const EntryPrefix = "entry/"

// ErrNoEntry is returned when no registration entry has the given ID.
var ErrNoEntry = errors.New("registration entry not found")

const (
	pageSize = 1000
	// relistDelay keeps a store that cannot be watched from being listed in a
	// busy loop.
	relistDelay = 200 * time.Millisecond
)

// Registry is safe for concurrent use. What it returns is immutable.
type Registry struct {
	store store.Store
	log   *slog.Logger

	mu      sync.RWMutex // guards everything below
	pic     picture
	changed chan struct{} // closed and replaced with every new revision
	heads   chan struct{} // closed and replaced with every new policy head
	feeds   map[*Feed]struct{}
	acks    map[spiffeid.ID]Ack
	history history
}

// picture is the state at one revision.
type picture struct {
	revision    uint64
	entries     map[string]*entry.Entry
	nodes       map[spiffeid.ID]*node
	admins      map[spiffeid.ID]map[string]*entry.Entry
	agents      map[spiffeid.ID]*attest.Agent
	revocations revocation.Set
	trust       *trust.Bundle
	heads       map[string]*release.Head
	replicas    replicas
}

// node is what hangs below one agent.
type node struct {
	entries map[string]*entry.Entry
	feeds   map[*Feed]struct{}
}

// Open lists the store. Run must follow for the picture to stay current.
func Open(ctx context.Context, st store.Store, log *slog.Logger) (*Registry, error) {
	r := &Registry{
		store: st, log: log,
		changed: make(chan struct{}), heads: make(chan struct{}), feeds: make(map[*Feed]struct{}), acks: make(map[spiffeid.ID]Ack),
	}
	pic, err := list(ctx, st)
	if err != nil {
		return nil, err
	}
	r.pic = pic
	r.history.known = pic.revision
	return r, nil
}

// Run keeps the picture current until ctx ends. It returns early only with a
// record that it cannot read: an authority that overlooks a revocation would
// be worse than none.
func (r *Registry) Run(ctx context.Context) error {
	for {
		err := r.follow(ctx)
		if ctx.Err() != nil || errors.Is(err, store.ErrClosed) {
			return nil
		}
		if err != nil && !errors.Is(err, store.ErrCompacted) {
			return err
		}
		r.log.LogAttrs(ctx, slog.LevelWarn, "registry fell behind the store and lists it again")
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(relistDelay):
		}
		if err := r.relist(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
	}
}

// follow applies batches until the watch ends.
func (r *Registry) follow(ctx context.Context) error {
	batches, err := r.store.Watch(ctx, "", r.Revision())
	if err != nil {
		return fmt.Errorf("watch the store: %w", err)
	}
	for b := range batches {
		if err := r.apply(b); err != nil {
			return err
		}
	}
	return nil
}

// relist replaces the picture; every stream gets a full listing.
func (r *Registry) relist(ctx context.Context) error {
	pic, err := list(ctx, r.store)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, n := range r.pic.nodes {
		if len(n.feeds) > 0 {
			pic.node(id).feeds = n.feeds
		}
	}
	r.pic = pic
	r.history = history{known: pic.revision}
	for f := range r.feeds {
		f.relist()
	}
	r.newHeads()
	r.advance(pic.revision)
	return nil
}

// list reads the whole picture at one revision.
func list(ctx context.Context, st store.Store) (picture, error) {
	for {
		pic, err := tryList(ctx, st)
		if errors.Is(err, store.ErrCompacted) && ctx.Err() == nil {
			continue // the store moved on under a long listing
		}
		return pic, err
	}
}

func tryList(ctx context.Context, st store.Store) (picture, error) {
	pic := newPicture()
	for _, prefix := range []string{EntryPrefix, attest.AgentPrefix, revocation.Prefix, trust.Key, release.HeadPrefix, replica.Prefix, replica.MarkKey} {
		for after, more := "", true; more; {
			var kvs []store.KV
			var err error
			kvs, pic.revision, more, err = st.List(ctx, prefix, after, pageSize, pic.revision)
			if err != nil {
				return picture{}, fmt.Errorf("list %s: %w", prefix, err)
			}
			for _, kv := range kvs {
				if _, err := pic.put(kv); err != nil {
					return picture{}, err
				}
				after = kv.Key
			}
		}
	}
	// Listing goes by key, the set by revision.
	pic.revocations = revocation.NewSet(pic.revocations.After(0, time.Time{}))
	return pic, nil
}

func newPicture() picture {
	return picture{
		entries: make(map[string]*entry.Entry), nodes: make(map[spiffeid.ID]*node),
		admins: make(map[spiffeid.ID]map[string]*entry.Entry), agents: make(map[spiffeid.ID]*attest.Agent),
		heads: make(map[string]*release.Head), replicas: replicas{byName: make(map[string]*replica.Record)},
	}
}

// apply takes one batch over and tells the streams concerned.
func (r *Registry) apply(b store.Batch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	unrevoked := make(map[string]bool)
	forAll := false
	for _, ev := range b.Events {
		if id, ok := strings.CutPrefix(ev.KV.Key, EntryPrefix); ok {
			if err := r.applyEntry(id, ev); err != nil {
				return err
			}
			continue
		}
		if ev.Delete {
			r.pic.remove(ev.KV.Key)
			unrevoked[ev.KV.Key] = strings.HasPrefix(ev.KV.Key, revocation.Prefix)
			continue
		}
		global, err := r.pic.put(ev.KV)
		if err != nil {
			return err
		}
		if strings.HasPrefix(ev.KV.Key, release.HeadPrefix) {
			r.newHeads()
		}
		forAll = forAll || global
	}
	if anyTrue(unrevoked) {
		r.pic.revocations.Remove(unrevoked)
	}
	if forAll {
		for f := range r.feeds {
			f.wake()
		}
	}
	r.advance(b.Revision)
	return nil
}

func anyTrue(m map[string]bool) bool {
	for _, v := range m {
		if v {
			return true
		}
	}
	return false
}

func (r *Registry) applyEntry(id string, ev store.Event) error {
	if old := r.pic.entries[id]; old != nil {
		r.pic.removeEntry(old)
		if ev.Delete {
			r.history.add(removal{revision: ev.KV.ModRevision, parent: old.ParentID, id: id})
		}
		r.pic.node(old.ParentID).touch(id)
		r.pic.tidy(old.ParentID)
	}
	if ev.Delete {
		return nil
	}
	if _, err := r.pic.put(ev.KV); err != nil {
		return err
	}
	r.pic.node(r.pic.entries[id].ParentID).touch(id)
	return nil
}

// advance moves to revision and wakes those who wait for it. r.mu is held.
func (r *Registry) advance(revision uint64) {
	r.pic.revision = revision
	close(r.changed)
	r.changed = make(chan struct{})
}

// newHeads wakes those who wait for a policy bundle. r.mu is held.
func (r *Registry) newHeads() {
	close(r.heads)
	r.heads = make(chan struct{})
}

// put takes one record over; forAll says that it concerns every node.
func (p *picture) put(kv store.KV) (forAll bool, err error) {
	switch {
	case strings.HasPrefix(kv.Key, EntryPrefix):
		return false, p.putEntry(kv)
	case strings.HasPrefix(kv.Key, attest.AgentPrefix):
		a, err := attest.DecodeAgent(kv)
		if err != nil {
			return false, err
		}
		p.agents[a.ID] = a
	case strings.HasPrefix(kv.Key, revocation.Prefix):
		rec, err := revocation.Decode(kv)
		if err != nil {
			return false, err
		}
		p.revocations.Add(rec)
		return true, nil
	case kv.Key == trust.Key:
		b, err := trust.Decode(kv)
		if err != nil {
			return false, err
		}
		p.trust = b
		return true, nil
	case strings.HasPrefix(kv.Key, release.HeadPrefix):
		h, err := release.DecodeHead(kv)
		if err != nil {
			return false, err
		}
		p.heads[h.Name] = h
		return true, nil
	case strings.HasPrefix(kv.Key, replica.Prefix), kv.Key == replica.MarkKey:
		return kv.Key == replica.MarkKey, p.putReplica(kv)
	}
	return false, nil // tokens, handles, policy chunks: read when needed
}

func (p *picture) putEntry(kv store.KV) error {
	e, err := entry.Decode(kv.Value)
	if err != nil {
		return fmt.Errorf("read %s: %w", kv.Key, err)
	}
	e.Revision = kv.ModRevision
	p.entries[e.ID] = e
	p.node(e.ParentID).entries[e.ID] = e
	if e.Admin {
		if p.admins[e.SPIFFEID] == nil {
			p.admins[e.SPIFFEID] = make(map[string]*entry.Entry)
		}
		p.admins[e.SPIFFEID][e.ID] = e
	}
	return nil
}

func (p *picture) removeEntry(e *entry.Entry) {
	delete(p.entries, e.ID)
	delete(p.node(e.ParentID).entries, e.ID)
	if admins := p.admins[e.SPIFFEID]; admins != nil {
		delete(admins, e.ID)
		if len(admins) == 0 {
			delete(p.admins, e.SPIFFEID)
		}
	}
}

// remove forgets a record that is no entry; revocations go all at once.
func (p *picture) remove(key string) {
	if name, ok := strings.CutPrefix(key, attest.AgentPrefix); ok {
		for id := range p.agents {
			if n, _ := entry.AgentName(id); n == name {
				delete(p.agents, id)
			}
		}
	}
	if name, ok := strings.CutPrefix(key, release.HeadPrefix); ok {
		delete(p.heads, name)
	}
	if name, ok := strings.CutPrefix(key, replica.Prefix); ok {
		delete(p.replicas.byName, name)
	}
	if key == trust.Key {
		p.trust = nil
	}
}

func (p *picture) node(id spiffeid.ID) *node {
	n := p.nodes[id]
	if n == nil {
		n = &node{entries: make(map[string]*entry.Entry), feeds: make(map[*Feed]struct{})}
		p.nodes[id] = n
	}
	return n
}

// tidy forgets a node that nothing hangs on.
func (p *picture) tidy(id spiffeid.ID) {
	if n := p.nodes[id]; n != nil && len(n.entries) == 0 && len(n.feeds) == 0 {
		delete(p.nodes, id)
	}
}

// touch tells the node's streams that entry id changed.
func (n *node) touch(id string) {
	for f := range n.feeds {
		f.mark(id)
	}
}

// Revision is the store revision of the picture.
func (r *Registry) Revision() uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.pic.revision
}

// Wait returns once the picture is at revision or later: after it, whoever
// wrote at that revision sees the effect.
func (r *Registry) Wait(ctx context.Context, revision uint64) error {
	for {
		r.mu.RLock()
		now, changed := r.pic.revision, r.changed
		r.mu.RUnlock()
		if now >= revision {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// Grounds is what an issuance rests on, all of one revision.
type Grounds struct {
	// Revision goes into the serial numbers of what is issued.
	Revision uint64
	// Agent is the live agent of the asked peer, nil if there is none.
	Agent *attest.Agent
	// Revocation withdraws the peer's SVID, if Revoked.
	Revocation svid.Revocation
	Revoked    bool
	// Entries are those asked for, in order; nil for unknown ones.
	Entries []*entry.Entry
}

// Grounds looks up what an issuance for p rests on. It is one picture: were
// the revocation looked up before the revision, an SVID issued in between would
// be stamped as newer than a revocation that it should fall under.
func (r *Registry) Grounds(p *svid.Peer, ids ...string) Grounds {
	r.mu.RLock()
	defer r.mu.RUnlock()
	g := Grounds{Revision: r.pic.revision, Agent: r.pic.agents[p.ID], Entries: make([]*entry.Entry, len(ids))}
	g.Revocation, g.Revoked = r.pic.revocations.Concerning(p)
	for i, id := range ids {
		g.Entries[i] = r.pic.entries[id]
	}
	return g
}

// Entry returns the entry with the given ID.
func (r *Registry) Entry(id string) (*entry.Entry, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	e, ok := r.pic.entries[id]
	return e, ok
}

// EntriesAfter returns up to limit entries with an ID above after for which
// match holds, ordered by ID, and whether there are more.
func (r *Registry) EntriesAfter(after string, limit int, match func(*entry.Entry) bool) ([]*entry.Entry, bool) {
	r.mu.RLock()
	var found []*entry.Entry
	for id, e := range r.pic.entries {
		if id > after && match(e) {
			found = append(found, e)
		}
	}
	r.mu.RUnlock()
	slices.SortFunc(found, func(a, b *entry.Entry) int { return strings.Compare(a.ID, b.ID) })
	if len(found) > limit {
		return found[:limit], true
	}
	return found, false
}

func sortedEntries(m map[string]*entry.Entry) []*entry.Entry {
	entries := make([]*entry.Entry, 0, len(m))
	for _, e := range m {
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b *entry.Entry) int { return strings.Compare(a.ID, b.ID) })
	return entries
}

// ExpiredEntries returns the entries that do not hold any more at now.
func (r *Registry) ExpiredEntries(now time.Time) []*entry.Entry {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var expired []*entry.Entry
	for _, e := range r.pic.entries {
		if e.Expired(now) {
			expired = append(expired, e)
		}
	}
	return expired
}

// Agent returns the live agent with the given ID.
func (r *Registry) Agent(id spiffeid.ID) (*attest.Agent, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	a, ok := r.pic.agents[id]
	return a, ok
}

// Admin says whether a live registration entry makes id an administrator.
func (r *Registry) Admin(id spiffeid.ID, now time.Time) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, e := range r.pic.admins[id] {
		if !e.Expired(now) {
			return true
		}
	}
	return false
}

// Revoked returns a record that withdraws the peer's SVID.
func (r *Registry) Revoked(p *svid.Peer) (svid.Revocation, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.pic.revocations.Concerning(p)
}

// Revocations returns the records that live at now, oldest first.
func (r *Registry) Revocations(now time.Time) []*revocation.Record {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.pic.revocations.After(0, now)
}

// ExpiredRevocations returns the store keys of the records that concern nobody
// any more.
func (r *Registry) ExpiredRevocations(now time.Time) []string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.pic.revocations.Expired(now)
}

// Trust is the published trust bundle; nil before the first.
func (r *Registry) Trust() *trust.Bundle {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.pic.trust
}

// PolicyHead is the head of the named policy bundle.
func (r *Registry) PolicyHead(name string) (*release.Head, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	h, ok := r.pic.heads[name]
	return h, ok
}

// HeadsChanged returns a channel that is closed when any policy bundle gets a
// new generation.
func (r *Registry) HeadsChanged() <-chan struct{} {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.heads
}

// GetX509BundleForTrustDomain implements x509bundle.Source with the published
// trust bundle, so that a root that is withdrawn there ends with it.
func (r *Registry) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := r.Trust()
	if b == nil || b.TrustDomain != td {
		return nil, fmt.Errorf("no trust bundle for trust domain %s", td)
	}
	return b.Keys.X509Bundle(), nil
}

// Counts says how much there is, for metrics.
func (r *Registry) Counts() (entries, agents, revocations, streams int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.pic.entries), len(r.pic.agents), r.pic.revocations.Len(), len(r.feeds)
}

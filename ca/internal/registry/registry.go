// Package registry is the CA's picture of its store in memory, kept current by
// one watch: entries, agents, revocations, replicas, the trust bundle and the
// heads of the policy bundles, all as of one revision. Issuance looks entries
// up here and learns the revision for the serial number; every Sync stream
// learns here what changed for its node. Readers hold an immutable picture and
// no lock; a change costs what it changes, not what there is.
package registry

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

// EntryPrefix is where the store keeps registration entries, by ID.
const EntryPrefix = "entry/"

// ErrNoEntry is returned when no registration entry has the given ID.
var ErrNoEntry = errors.New("registration entry not found")

// Registry is safe for concurrent use. What it returns is immutable.
type Registry struct {
	store store.Store
	log   *slog.Logger

	pic     atomic.Pointer[picture] // stored with mu held
	fault   atomic.Pointer[error]
	decoder entry.Decoder // of Run alone
	reading chan struct{} // holds a token while history is read back
	feeds   feeds
	rounds  rounds
	acks    acks

	mu      sync.Mutex    // guards everything below; taken last of all locks
	changed chan struct{} // closed and replaced with every new revision
	heads   chan struct{} // closed and replaced with every new policy head
	steps   chan struct{} // closed and replaced with every step of the authorities
	history history
}

// Open lists the store. Run must follow for the picture to stay current.
func Open(ctx context.Context, st store.Store, log *slog.Logger) (*Registry, error) {
	pic, c, err := list(ctx, st)
	if err != nil {
		return nil, err
	}
	r := newRegistry(st, log, pic)
	r.logLeftOut(ctx, c.leftOut)
	return r, nil
}

func newRegistry(st store.Store, log *slog.Logger, pic *picture) *Registry {
	r := &Registry{
		store: st, log: log, reading: make(chan struct{}, 1),
		changed: make(chan struct{}), heads: make(chan struct{}), steps: make(chan struct{}),
		feeds: newFeeds(), rounds: newRounds(), acks: newAcks(),
		history: history{known: pic.revision},
	}
	r.pic.Store(pic)
	return r
}

// Revision is the store revision of the picture.
func (r *Registry) Revision() uint64 { return r.pic.Load().revision }

// ErrBehind is returned by Wait: the picture does not follow the store.
var ErrBehind = errors.New("this CA does not follow its store")

// waitPatience bounds Wait, for callers whose context does not.
const waitPatience = 10 * time.Second

// Wait returns once the picture is at revision or later: after it, whoever
// wrote at that revision sees the effect. ErrBehind: the picture does not get
// there; what was written stays.
func (r *Registry) Wait(ctx context.Context, revision uint64) error {
	if r.Revision() >= revision {
		return nil
	}
	patience := time.NewTimer(waitPatience)
	defer patience.Stop()
	for {
		r.mu.Lock()
		now, changed := r.Revision(), r.changed
		r.mu.Unlock()
		if now >= revision {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-patience.C:
			return fmt.Errorf("%w: its picture is at revision %d, and %d is stored: %v", ErrBehind, now, revision, r.Fault())
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

	pic *picture
}

// Grounds looks up what an issuance for p rests on. It is one picture: were
// the revocation looked up before the revision, an SVID issued in between would
// be stamped as newer than a revocation that it should fall under.
func (r *Registry) Grounds(p *svid.Peer, ids ...string) Grounds {
	pic := r.pic.Load()
	g := Grounds{pic: pic, Revision: pic.revision, Agent: pic.agent(p.ID), Entries: make([]*entry.Entry, len(ids))}
	g.Revocation, g.Revoked = pic.revocations.Concerning(p)
	for i, id := range ids {
		g.Entries[i] = pic.entries.get(id)
	}
	return g
}

// Entry returns the entry with the given ID.
func (r *Registry) Entry(id string) (*entry.Entry, bool) {
	e := r.pic.Load().entries.get(id)
	return e, e != nil
}

// Filter says which entries are meant; what is empty means any.
type Filter struct {
	ParentID, SPIFFEID string
	// Only lets an entry be among them; nil lets each.
	Only func(*entry.Entry) bool
}

func (f Filter) means(e *entry.Entry) bool {
	return (f.ParentID == "" || e.ParentID.String() == f.ParentID) && (f.SPIFFEID == "" || e.SPIFFEID.String() == f.SPIFFEID) &&
		(f.Only == nil || f.Only(e))
}

// Entries returns up to limit entries of the filter with an ID above after,
// ordered by ID, and whether there are more. A page costs what it holds,
// except that with both fields it passes over the other entries of the parent.
func (r *Registry) Entries(f Filter, after string, limit int) (page []*entry.Entry, more bool) {
	s := &r.pic.Load().entries
	tree, group := s.byID, uint64(0)
	switch {
	case f.ParentID != "":
		tree, group = s.byParent, index.Hash(f.ParentID)
	case f.SPIFFEID != "":
		tree, group = s.bySPIFFEID, index.Hash(f.SPIFFEID)
	}
	walk := tree.Group(group)
	if after != "" {
		walk = tree.After(index.ID(group, after))
	}
	for e := range walk {
		if !f.means(e) {
			continue
		}
		if len(page) == limit {
			return page, true
		}
		page = append(page, e)
	}
	return page, false
}

// Holds says whether an entry of the agent's node, its own or an alias's, gives the
// SPIFFE ID id at now.
func (r *Registry) Holds(agent, id spiffeid.ID, now time.Time) bool {
	pic := r.pic.Load()
	g := Grounds{pic: pic, Agent: pic.agent(agent)}
	for e := range named(pic.entries.bySPIFFEID, id, now) {
		if g.Concerns(e, now) {
			return true
		}
	}
	return false
}

// Identities are the SPIFFE IDs that entries of the agent's node, its own or an
// alias's, give at now, and the agent's own, sorted. It goes over all of them.
func (r *Registry) Identities(agent spiffeid.ID, now time.Time) []string {
	pic := r.pic.Load()
	ids := []string{agent.String()}
	g := Grounds{pic: pic, Agent: pic.agent(agent)}
	for e := range pic.entries.below(append(pic.aliases(agent), agent)...) {
		if !e.Expired(now) && g.Concerns(e, now) {
			ids = append(ids, e.SPIFFEID.String())
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// ExpiredEntries returns the entries that do not hold any more at now, and
// looks at no others.
func (r *Registry) ExpiredEntries(now time.Time) []*entry.Entry {
	var expired []*entry.Entry
	for k, e := range r.pic.Load().entries.byExpiry.All() {
		if k[0] > index.Time(now) {
			break
		}
		if e.Expired(now) {
			expired = append(expired, e)
		}
	}
	return expired
}

// Agent returns the live agent with the given ID.
func (r *Registry) Agent(id spiffeid.ID) (*attest.Agent, bool) {
	a := r.pic.Load().agent(id)
	return a, a != nil
}

func (p *picture) agent(id spiffeid.ID) *attest.Agent {
	name, ok := entry.AgentName(id)
	if !ok {
		return nil
	}
	a, _ := p.agents.Get(idKey(name))
	if a == nil || a.ID != id { // of another trust domain
		return nil
	}
	return a
}

// Role returns what a workload with the given SPIFFE ID may administer: the role
// that all of its live entries give it. Where one of them gives another or none,
// it has none: whoever can register an ID would otherwise have the power that
// somebody else gave it.
func (r *Registry) Role(id spiffeid.ID, now time.Time) role.Role {
	s := &r.pic.Load().entries
	if agreed(named(s.roles, id, now)) == (role.Role{}) { // most have none
		return role.Role{}
	}
	return agreed(named(s.bySPIFFEID, id, now))
}

// HasRole says whether any live entry gives id a role, also where others disagree.
func (r *Registry) HasRole(id spiffeid.ID, now time.Time) bool {
	_, has := r.Disagrees(&entry.Entry{SPIFFEID: id}, now)
	return has
}

// Disagrees returns a live entry for the SPIFFE ID of e that gives another role.
func (r *Registry) Disagrees(e *entry.Entry, now time.Time) (*entry.Entry, bool) {
	s := &r.pic.Load().entries
	tree := s.bySPIFFEID // an ID can have as many as there are nodes
	if e.Role == (role.Role{}) {
		tree = s.roles
	}
	for other := range named(tree, e.SPIFFEID, now) {
		if other.Role != e.Role {
			return other, true
		}
	}
	return nil, false
}

// named are the live entries of id in a tree that is ordered by SPIFFE ID.
func named(tree index.Tree[*entry.Entry], id spiffeid.ID, now time.Time) iter.Seq[*entry.Entry] {
	return func(yield func(*entry.Entry) bool) {
		for e := range tree.Group(index.Hash(id.String())) {
			if e.SPIFFEID == id && !e.Expired(now) && !yield(e) {
				return
			}
		}
	}
}

// agreed is the role that all of the entries give.
func agreed(entries iter.Seq[*entry.Entry]) (r role.Role) {
	first := true
	for e := range entries {
		if !first && e.Role != r {
			return role.Role{}
		}
		r, first = e.Role, false
	}
	return r
}

// Revoked returns a record that withdraws the peer's SVID.
func (r *Registry) Revoked(p *svid.Peer) (svid.Revocation, bool) {
	return r.pic.Load().revocations.Concerning(p)
}

// Revocations returns the records that live at now, oldest first.
func (r *Registry) Revocations(now time.Time) []*revocation.Record {
	return r.pic.Load().revocations.After(0, now)
}

// ExpiredRevocations returns the records that concern nobody any more at now.
func (r *Registry) ExpiredRevocations(now time.Time) []*revocation.Record {
	return r.pic.Load().revocations.Expired(now)
}

// Trust is the published trust bundle; nil before the first.
func (r *Registry) Trust() *trust.Bundle { return r.pic.Load().trust }

// GetX509BundleForTrustDomain implements x509bundle.Source with the published
// trust bundle, so that a root that is withdrawn there ends with it.
func (r *Registry) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := r.Trust()
	if b == nil || b.TrustDomain != td {
		return nil, fmt.Errorf("no trust bundle for trust domain %s", td)
	}
	return b.Keys.X509Bundle(), nil
}

// VerifyChain implements svid.Verifier by the published trust bundle. Nobody is believed
// before the first.
func (r *Registry) VerifyChain(presented []*x509.Certificate, now time.Time) (*svid.Peer, error) {
	if v := r.pic.Load().verifier; v != nil {
		return v.VerifyChain(presented, now)
	}
	return new(svid.Trust).VerifyChain(presented, now)
}

// Counts says how much there is, for metrics. It goes over all streams: what is done
// for each agent asks Size.
func (r *Registry) Counts() (entries, agents, revocations, streams int) {
	pic := r.pic.Load()
	return pic.entries.byID.Len(), pic.agents.Len(), pic.revocations.Len(), len(r.feeds.open())
}

// Size is how many entries and agents there are.
func (r *Registry) Size() (entries, agents int) {
	pic := r.pic.Load()
	return pic.entries.byID.Len(), pic.agents.Len()
}

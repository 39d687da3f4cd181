// The picture: what the store held at one revision, indexed for those who ask.
// It is a value of persistent trees: the next picture is made from it and
// shares what has not changed, so a reader that holds one keeps one revision,
// and a change costs what it changes.

package registry

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rollout"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

// picture is immutable once it is published. A copy can be changed: its trees
// are values and its maps are replaced, never written to.
type picture struct {
	revision    uint64
	entries     entries
	agents      index.Tree[*attest.Agent] // by name
	revocations revocation.Set
	trust       *trust.Bundle
	verifier    *svid.Trust // by it
	authorities rotation.Set
	heads       map[string]*release.Head  // by name; few
	shares      map[string]*rollout.Share // by bundle and replica; replaced, never written to
	federated   federated
	invites     map[string]*federation.Invite // by key; replaced, never written to
	replicas    replicas
}

// entries are the registration entries, in every order that is asked for.
type entries struct {
	byID, byParent, bySPIFFEID index.Tree[*entry.Entry]
	byExpiry                   index.Tree[*entry.Entry] // those that expire
	roles                      index.Tree[*entry.Entry] // those with a role, by SPIFFE ID
	federating                 index.Tree[*entry.Entry] // by parent and trust domain that it federates with
}

// The keys of an entry in each of the trees.
func idKey(id string) index.Key          { return index.ID(0, id) }
func parentKey(e *entry.Entry) index.Key { return index.ID(index.Hash(e.ParentID.String()), e.ID) }
func nameKey(e *entry.Entry) index.Key   { return index.ID(index.Hash(e.SPIFFEID.String()), e.ID) }
func expiryKey(e *entry.Entry) index.Key { return index.ID(index.Time(e.ExpiresAt), e.ID) }

func (s *entries) get(id string) *entry.Entry {
	e, _ := s.byID.Get(idKey(id))
	if e == nil || e.ID != id { // hex in capitals, say
		return nil
	}
	return e
}

// put takes over e in place of old, which may be nil.
func (s *entries) put(e, old *entry.Entry) {
	if old != nil && (old.ParentID != e.ParentID || old.SPIFFEID != e.SPIFFEID || !old.ExpiresAt.IsZero() || old.Role != e.Role || len(old.FederatesWith) > 0) {
		s.remove(old)
	}
	s.byID = s.byID.With(idKey(e.ID), e)
	s.byParent = s.byParent.With(parentKey(e), e)
	s.bySPIFFEID = s.bySPIFFEID.With(nameKey(e), e)
	if !e.ExpiresAt.IsZero() {
		s.byExpiry = s.byExpiry.With(expiryKey(e), e)
	}
	if e.Role.Name != "" {
		s.roles = s.roles.With(nameKey(e), e)
	}
	for _, td := range e.FederatesWith {
		s.federating = s.federating.With(federatingKey(e, td), e)
	}
}

func (s *entries) remove(e *entry.Entry) {
	s.byID = s.byID.Without(idKey(e.ID))
	s.byParent = s.byParent.Without(parentKey(e))
	s.bySPIFFEID = s.bySPIFFEID.Without(nameKey(e))
	s.byExpiry = s.byExpiry.Without(expiryKey(e))
	s.roles = s.roles.Without(nameKey(e))
	for _, td := range e.FederatesWith {
		s.federating = s.federating.Without(federatingKey(e, td))
	}
}

// change is what one batch meant, for the streams and the log.
type change struct {
	touched []touch
	gone    []removal
	// lost are the agents whose records went, renewed those of whose nodes something
	// else is proved now, lost ones among them.
	lost, renewed []spiffeid.ID
	// named are the agents that a revocation names.
	named []spiffeid.ID
	// aliases are those whose entries changed.
	aliases []spiffeid.ID
	// forAll: it concerns every node. heads: those who wait for policy bundles.
	// steps: those who do what the authorities ask for.
	forAll, heads, steps bool
	// leftOut says which records could not be read.
	leftOut []error
}

// touch is an entry that changed for a node.
type touch struct {
	node spiffeid.ID
	id   string
}

// apply makes p the picture after b. The error is that of a record without
// which there must be no picture; p is then of no use.
func (p *picture) apply(b store.Batch, dec *entry.Decoder) (change, error) {
	var c change
	for _, ev := range b.Events {
		if ev.Delete {
			p.remove(ev.KV, &c)
		} else if err := p.put(ev.KV, dec, &c); err != nil {
			return c, err
		}
	}
	p.revision = b.Revision
	return c, nil
}

// put takes one record over. What cannot be read fails closed, each kind in its
// way: an entry, an agent, a replica, a federated trust bundle or an invite is left out, so
// nobody has anything of it; a revocation, trust bundle, policy head or the state of an authority may
// take something away, and a CA that overlooks that would be worse than none.
func (p *picture) put(kv store.KV, dec *entry.Decoder, c *change) error {
	switch {
	case strings.HasPrefix(kv.Key, EntryPrefix):
		e, err := decodeEntry(kv, dec)
		if err != nil {
			return p.leaveOut(kv, err, c)
		}
		p.putEntry(e, c)
	case strings.HasPrefix(kv.Key, attest.AgentPrefix):
		a, err := decodeAgent(kv)
		if err != nil {
			return p.leaveOut(kv, err, c)
		}
		if old := p.agent(a.ID); old == nil || !slices.Equal(old.Selectors, a.Selectors) {
			c.renewed = append(c.renewed, a.ID)
		}
		p.agents = p.agents.With(idKey(strings.TrimPrefix(kv.Key, attest.AgentPrefix)), a)
	case strings.HasPrefix(kv.Key, replica.Prefix):
		r, err := replica.Decode(kv)
		if err != nil {
			return p.leaveOut(kv, err, c)
		}
		p.replicas = p.replicas.with(r)
	case strings.HasPrefix(kv.Key, replica.ProgressPrefix):
		progress, err := replica.DecodeProgress(kv)
		if err != nil {
			c.leftOut = append(c.leftOut, err)
		}
		p.replicas = p.replicas.heard(progress)
	case strings.HasPrefix(kv.Key, alivePrefix):
		p.replicas = p.replicas.alive(strings.TrimPrefix(kv.Key, alivePrefix), true)
		c.steps = true
	case kv.Key == replica.MarkKey:
		p.replicas.keysAt = kv.ModRevision
		c.forAll, c.heads = true, true
	case strings.HasPrefix(kv.Key, revocation.Prefix):
		r, err := revocation.Decode(kv)
		if err != nil {
			return err
		}
		p.revocations = p.revocations.With(r)
		c.forAll = true
		if id, err := spiffeid.FromString(r.AgentID); err == nil {
			c.named = append(c.named, id)
		}
	case kv.Key == trust.Key:
		b, err := trust.Decode(kv)
		if err != nil {
			return err
		}
		p.trust, p.verifier = b, svid.NewTrust(x509bundle.NewSet(b.Keys.X509Bundle()))
		c.forAll = true
	case kv.Key == trust.AuthoritiesKey:
		set, err := rotation.Decode(kv.Value)
		if err != nil {
			return err
		}
		p.authorities = set
		c.steps = true
	case strings.HasPrefix(kv.Key, trust.FederatedPrefix):
		b, err := trust.DecodeFederated(kv)
		if err != nil {
			return p.leaveOut(kv, err, c)
		}
		p.federated = p.federated.with(b, kv.ModRevision)
		c.forAll = true
	case strings.HasPrefix(kv.Key, federation.InvitePrefix):
		invite, err := federation.DecodeInvite(kv)
		if err != nil {
			return p.leaveOut(kv, err, c)
		}
		p.invites = withInvite(p.invites, kv.Key, invite)
	case strings.HasPrefix(kv.Key, release.HeadPrefix):
		h, err := release.DecodeHead(kv)
		if err != nil {
			return err
		}
		p.heads = maps.Clone(p.heads)
		p.heads[h.Name] = h
		c.forAll, c.heads = true, true
	case strings.HasPrefix(kv.Key, rollout.SharePrefix):
		share, err := rollout.DecodeShare(kv)
		if err != nil {
			return p.leaveOut(kv, err, c)
		}
		p.shares = maps.Clone(p.shares)
		if p.shares == nil {
			p.shares = make(map[string]*rollout.Share)
		}
		p.shares[kv.Key] = share
	} // tokens, handles, policy chunks: read when needed
	return nil
}

// leaveOut removes what the record said before. Not where a newer Merlon wrote
// it: this one would take identities away that are good.
func (p *picture) leaveOut(kv store.KV, err error, c *change) error {
	if errors.Is(err, entry.ErrNewer) {
		return err
	}
	c.leftOut = append(c.leftOut, err)
	p.remove(kv, c)
	return nil
}

func decodeEntry(kv store.KV, dec *entry.Decoder) (*entry.Entry, error) {
	e, err := dec.Decode(kv.Value)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kv.Key, err)
	}
	if kv.Key != EntryPrefix+e.ID || !entry.ValidID(e.ID) {
		return nil, fmt.Errorf("read %s: it holds entry %.80q", kv.Key, e.ID)
	}
	e.Revision = kv.ModRevision
	return e, nil
}

func decodeAgent(kv store.KV) (*attest.Agent, error) {
	a, err := attest.DecodeAgent(kv)
	if err != nil {
		return nil, err
	}
	if name, ok := entry.AgentName(a.ID); !ok || kv.Key != attest.AgentPrefix+name {
		return nil, fmt.Errorf("read %s: it holds %s", kv.Key, a.ID)
	}
	return a, nil
}

func (p *picture) putEntry(e *entry.Entry, c *change) {
	old := p.entries.get(e.ID)
	p.entries.put(e, old)
	c.touched = append(c.touched, touch{e.ParentID, e.ID})
	if e.Alias() {
		c.aliases = append(c.aliases, e.SPIFFEID)
	}
	if old != nil && old.ParentID != e.ParentID {
		c.touched = append(c.touched, touch{old.ParentID, e.ID})
		// For streams that resume: it is gone from there.
		c.gone = append(c.gone, removal{e.Revision, old.ParentID, e.ID})
	}
}

// remove forgets a record; kv.ModRevision is that of what took it away.
func (p *picture) remove(kv store.KV, c *change) {
	if id, ok := strings.CutPrefix(kv.Key, EntryPrefix); ok {
		p.removeEntry(id, kv.ModRevision, c)
	} else if name, ok := strings.CutPrefix(kv.Key, attest.AgentPrefix); ok {
		if a, ok := p.agents.Get(idKey(name)); ok {
			p.agents = p.agents.Without(idKey(name))
			c.lost, c.renewed = append(c.lost, a.ID), append(c.renewed, a.ID)
		}
	} else if strings.HasPrefix(kv.Key, revocation.Prefix) {
		p.revocations = p.revocations.Without(kv.Key)
	} else if name, ok := strings.CutPrefix(kv.Key, trust.FederatedPrefix); ok {
		p.federated = p.federated.without(name, kv.ModRevision)
		c.forAll = true
	} else if strings.HasPrefix(kv.Key, federation.InvitePrefix) {
		p.invites = withInvite(p.invites, kv.Key, nil)
	} else if name, ok := strings.CutPrefix(kv.Key, release.HeadPrefix); ok {
		p.heads = maps.Clone(p.heads)
		delete(p.heads, name)
	} else if strings.HasPrefix(kv.Key, rollout.SharePrefix) {
		p.shares = maps.Clone(p.shares)
		delete(p.shares, kv.Key)
	} else if name, ok := strings.CutPrefix(kv.Key, replica.Prefix); ok {
		p.replicas = p.replicas.without(name)
	} else if name, ok := strings.CutPrefix(kv.Key, replica.ProgressPrefix); ok {
		p.replicas = p.replicas.silent(name)
	} else if name, ok := strings.CutPrefix(kv.Key, alivePrefix); ok {
		p.replicas = p.replicas.alive(name, false)
	} else if kv.Key == trust.Key {
		p.trust, p.verifier = nil, nil
	} else if kv.Key == trust.AuthoritiesKey {
		p.authorities = rotation.Set{} // until the root holder writes them down again
	}
}

func (p *picture) removeEntry(id string, revision uint64, c *change) {
	if e := p.entries.get(id); e != nil {
		p.entries.remove(e)
		c.touched = append(c.touched, touch{e.ParentID, id})
		if e.Alias() {
			c.aliases = append(c.aliases, e.SPIFFEID)
		}
		c.gone = append(c.gone, removal{revision, e.ParentID, id})
	}
}

// kinds are the prefixes of what the picture holds.
var kinds = []string{EntryPrefix, attest.AgentPrefix, revocation.Prefix, trust.Key, trust.AuthoritiesKey, trust.FederatedPrefix, federation.InvitePrefix, release.HeadPrefix, rollout.SharePrefix, replica.Prefix, replica.ProgressPrefix, replica.MarkKey, alivePrefix}

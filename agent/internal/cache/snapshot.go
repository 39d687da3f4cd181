// What the node needs to go on after a restart while the CA is away, in a form
// for the disk: entries, revocations, and the SVIDs at hand. What comes back is
// judged as if the CA had just sent it; an SVID when it is first asked for, so
// that ten thousand of them hold up no start.

package cache

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// snapshotVersion is the form of Snapshot.
const snapshotVersion = 1

// Snapshot is the node's picture at one moment.
type Snapshot struct {
	Version     int    `json:"version"`
	TrustDomain string `json:"trust_domain"`
	// AgentID is whose picture it is. Empty: it is not known.
	AgentID  string    `json:"agent_id,omitempty"`
	Revision uint64    `json:"revision"`
	Heard    time.Time `json:"heard,omitzero"`
	SavedAt  time.Time `json:"saved_at"`
	// Entries are messages merlon.ca.v1.Entry.
	Entries     [][]byte          `json:"entries"`
	Revocations []svid.Revocation `json:"revocations"`
	// Federated are messages merlon.ca.v1.TrustBundle of other trust domains.
	Federated [][]byte     `json:"federated,omitempty"`
	SVIDs     []StoredSVID `json:"svids,omitempty"`
	JWTs      []StoredJWT  `json:"jwts,omitempty"`
}

// StoredSVID is an X509-SVID with its key.
type StoredSVID struct {
	EntryID     string    `json:"entry_id"`
	Certificate string    `json:"certificate"` // Entry.certificate that it was made for
	Chain       []byte    `json:"chain"`
	Key         []byte    `json:"key"`
	RenewAt     time.Time `json:"renew_at"`
	NotAfter    time.Time `json:"not_after"`
}

// StoredJWT is a JWT-SVID.
type StoredJWT struct {
	EntryID  string    `json:"entry_id"`
	Audience []string  `json:"audience"`
	Token    string    `json:"token"`
	RenewAt  time.Time `json:"renew_at"`
}

// ParseSnapshot reads what Marshal wrote, for trust domain td.
func ParseSnapshot(content []byte, td string) (*Snapshot, error) {
	dec := json.NewDecoder(bytes.NewReader(content))
	dec.DisallowUnknownFields()
	var s Snapshot
	if err := dec.Decode(&s); err != nil {
		return nil, fmt.Errorf("read the cache: %w", err)
	}
	switch {
	case dec.More():
		return nil, errors.New("read the cache: there is more in the file")
	case s.Version != snapshotVersion:
		return nil, fmt.Errorf("read the cache: format %d is not known here; another version of the agent wrote it", s.Version)
	case s.TrustDomain != td:
		return nil, fmt.Errorf("read the cache: it is of trust domain %q, expected %q", s.TrustDomain, td)
	}
	return &s, nil
}

// Marshal is the form on disk.
func (s *Snapshot) Marshal() ([]byte, error) { return json.Marshal(s) }

// Changed receives when a Snapshot would come out differently.
func (c *Cache) Changed() <-chan struct{} { return c.changed }

// Snapshot takes the picture; nil before there is one. Without secrets it has
// neither X509-SVIDs, which are of no use without their keys, nor JWT-SVIDs,
// which are enough to pass for a workload.
func (c *Cache) Snapshot(agentID string, secrets bool) *Snapshot {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.synced {
		return nil
	}
	s := &Snapshot{
		Version: snapshotVersion, TrustDomain: c.td.Name(), AgentID: agentID,
		Revision: c.revision, Heard: c.Heard(), SavedAt: now,
		Entries: make([][]byte, 0, len(c.entries)), Revocations: c.revocations.Load().All(),
	}
	for _, e := range c.entries {
		s.Entries = append(s.Entries, e.wire)
	}
	for _, name := range slices.Sorted(maps.Keys(c.federated)) {
		s.Federated = append(s.Federated, c.federated[name].wire)
	}
	if !secrets {
		return s
	}
	for _, sl := range c.slots {
		if held := sl.svid; held != nil && held.Key != nil && now.Before(held.Peer.NotAfter) {
			s.SVIDs = append(s.SVIDs, StoredSVID{
				EntryID: held.Entry.ID, Certificate: held.Entry.certificate, Chain: held.Chain, Key: held.Key,
				RenewAt: held.renewAt, NotAfter: held.Peer.NotAfter,
			})
		}
	}
	for id, kept := range c.kept {
		if e := c.entries[id]; e == nil || !e.AgentKey || !now.Before(kept.NotAfter) {
			delete(c.kept, id)
			continue
		}
		s.SVIDs = append(s.SVIDs, kept)
	}
	s.JWTs = c.jwts.stored(now)
	return s
}

// Restore takes up a picture before any other. The trust bundle that is held
// must be that of the same time or later. A picture that is older than what
// this node has seen is refused: it lacks what was revoked and deleted since.
func (c *Cache) Restore(ctx context.Context, s *Snapshot) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.Revision < c.seen {
		return fmt.Errorf("take up the cache: it is of store revision %d, and this node has seen revision %d: an older copy was put in its place", s.Revision, c.seen)
	}
	if c.synced || c.trust.Load() == nil {
		return errors.New("take up the cache: there is no trust bundle, or a picture already")
	}
	for _, wire := range s.Entries {
		var pb capb.Entry
		if err := proto.Unmarshal(wire, &pb); err != nil {
			return fmt.Errorf("take up the cache: an entry: %w", err)
		}
		c.put(ctx, &pb)
	}
	federated := make([]*capb.TrustBundle, 0, len(s.Federated))
	for _, wire := range s.Federated {
		var pb capb.TrustBundle
		if err := proto.Unmarshal(wire, &pb); err != nil {
			return fmt.Errorf("take up the cache: a federated trust bundle: %w", err)
		}
		federated = append(federated, &pb)
	}
	c.takeFederated(ctx, federated)
	for _, r := range s.Revocations {
		if err := r.Validate(); err != nil {
			return fmt.Errorf("take up the cache: %w", err)
		}
	}
	c.replaceRevocations(s.Revocations)
	for _, kept := range s.SVIDs {
		if c.entries[kept.EntryID] != nil {
			c.kept[kept.EntryID] = kept
		}
	}
	c.restoreJWTs(ctx, s.JWTs)
	c.revision, c.synced, c.relist = s.Revision, true, true
	c.seen = max(c.seen, s.Revision)
	heard := s.Heard
	if now := time.Now(); heard.After(now) {
		heard = now
	}
	if heard.After(c.Heard()) {
		c.heard.Store(&heard)
	}
	c.notifyAll()
	return nil
}

// takeKept gives the SVID of e that was on disk, nil if there is none or it
// does not hold any more. c.mu is held.
func (c *Cache) takeKept(e *Entry) *SVID {
	kept, ok := c.kept[e.ID]
	if !ok {
		return nil
	}
	delete(c.kept, e.ID)
	made, err := c.revive(e, kept, time.Now())
	if err != nil {
		c.log.LogAttrs(context.Background(), slog.LevelInfo, "SVID from the disk is not used",
			slog.String("spiffe_id", e.SPIFFEID.String()), slog.String("entry_id", e.ID), slog.Any("err", err))
		return nil
	}
	return c.hurry(made)
}

// revive judges an SVID from the disk like one that the CA has just sent.
func (c *Cache) revive(e *Entry, kept StoredSVID, now time.Time) (*SVID, error) {
	if kept.Certificate != e.certificate {
		return nil, errors.New("its entry has changed")
	}
	certs, err := x509.ParseCertificates(kept.Chain)
	if err != nil {
		return nil, fmt.Errorf("parse the chain: %w", err)
	}
	key, err := x509.ParsePKCS8PrivateKey(kept.Key)
	if err != nil {
		return nil, fmt.Errorf("parse the key: %w", err)
	}
	trust := c.trust.Load()
	peer, err := svid.VerifyChain(certs, trust.Bundle, now)
	if err != nil {
		return nil, err
	}
	private, ok := key.(*ecdsa.PrivateKey)
	switch {
	case peer.ID != e.SPIFFEID:
		return nil, fmt.Errorf("it is of %s", peer.ID)
	case !ok || !private.PublicKey.Equal(peer.Leaf.PublicKey):
		return nil, errors.New("its key is another")
	case c.connected && trust.Taints(peer.AuthorityIDs):
		return nil, errors.New("it was signed by a tainted authority") // of which the CA was told that nothing is left
	}
	made := &SVID{Entry: e, Chain: kept.Chain, Key: kept.Key, Peer: peer, renewAt: kept.RenewAt}
	return made, c.checkRevoked(made)
}

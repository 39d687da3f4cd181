// Package nested keeps what a nested CA has in its store as it is in that of the CA
// above it: the trust bundle with its sequence, the authorities, its own record
// among the replicas, and the revocations of everybody else. With these in place
// the rest of a CA works as on a replica that shares the store.
package nested

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// seenKey is where the store keeps how far it follows the CA above.
const seenKey = "upstream"

const encodingVersion = 1

// ErrOlder is returned for a state that is older than what is here: the CA above was
// restored from an older backup, or set back. What is here stays.
var ErrOlder = errors.New("the CA above knows less than this one has seen of it: its store was restored from an older backup, or set back")

// State is what both have in common, in the encoding of the store, as of a revision
// of the upper one's.
type State struct {
	Revision                         uint64
	TrustBundle, Authorities, Record []byte
}

// Mirror writes it down. It is safe for concurrent use.
type Mirror struct {
	Store       store.Store
	TrustDomain spiffeid.TrustDomain

	mu      sync.Mutex
	applied uint64 // revision of the newest state, of this run; guarded by mu
}

type storedSeen struct {
	Version  int    `json:"v"`
	Revision uint64 `json:"revision"`
}

// Seen returns up to which revision of the CA above everything is here, and the
// sequence of its trust bundle; 0 for nothing.
func (m *Mirror) Seen(ctx context.Context) (revision, sequence uint64, err error) {
	bundle, err := trust.Current(ctx, m.Store)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return 0, 0, err
	}
	if bundle != nil {
		sequence = bundle.Sequence
	}
	kv, _, err := m.Store.Get(ctx, seenKey)
	if errors.Is(err, store.ErrNotFound) {
		return 0, sequence, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read how far the CA above is followed: %w", err)
	}
	var s storedSeen
	if err := json.Unmarshal(kv.Value, &s); err != nil || s.Version != encodingVersion {
		return 0, 0, fmt.Errorf("read how far the CA above is followed: %.100q makes no sense", kv.Value)
	}
	return s.Revision, sequence, nil
}

// decoded is a state that was read and makes sense.
type decoded struct {
	bundle *trust.Bundle
	record *replica.Record
}

// read checks a state: one that this CA could not start with must not replace one
// that it can.
func (m *Mirror) read(s State) (d decoded, err error) {
	if d.bundle, err = trust.Decode(store.KV{Key: trust.Key, Value: s.TrustBundle}); err != nil {
		return d, err
	}
	if d.bundle.TrustDomain != m.TrustDomain {
		return d, fmt.Errorf("the CA above is of trust domain %s, and this one of %s", d.bundle.TrustDomain, m.TrustDomain)
	}
	set, err := rotation.Decode(s.Authorities)
	if err != nil {
		return d, err
	}
	if set.Root() == nil || len(d.bundle.Keys.X509Authorities()) == 0 {
		return d, errors.New("the CA above names no root that signs")
	}
	var named struct{ Name string }
	if err := json.Unmarshal(s.Record, &named); err != nil {
		return d, fmt.Errorf("decode the record of this CA: %w", err)
	}
	d.record, err = replica.Decode(store.KV{Key: replica.Prefix + named.Name, Value: s.Record})
	if err == nil && !d.record.Nested() {
		err = fmt.Errorf("the record of this CA says that %s shares a store", d.record.Name)
	}
	return d, err
}

// Join puts down the first state. A store that another root's CA has used is
// refused.
func (m *Mirror) Join(ctx context.Context, s State) error {
	d, err := m.read(s)
	if err != nil {
		return err
	}
	before, err := trust.Current(ctx, m.Store)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	case !sharesRoot(before, d.bundle):
		return trust.ErrOtherRoot
	}
	_, err = m.put(ctx, s, d)
	return err
}

func sharesRoot(a, b *trust.Bundle) bool {
	return slices.ContainsFunc(a.Keys.X509Authorities(), b.Keys.HasX509Authority)
}

// Apply puts down a newer state, and returns the revision that wrote it, of this
// store; 0 where it is here already.
func (m *Mirror) Apply(ctx context.Context, s State) (uint64, error) {
	d, err := m.read(s)
	if err != nil {
		return 0, err
	}
	before, err := trust.Current(ctx, m.Store)
	if err != nil {
		return 0, err
	}
	rec, err := replica.Read(ctx, m.Store, d.record.Name)
	if err != nil {
		return 0, err
	}
	if rec.Realm != d.record.Realm {
		return 0, fmt.Errorf("the CA above knows %s as realm %d, and this one is realm %d", rec.Name, d.record.Realm, rec.Realm)
	}
	if d.bundle.Sequence < before.Sequence {
		m.mu.Lock()
		stale := s.Revision < m.applied // an answer that was overtaken by another
		m.mu.Unlock()
		if stale {
			return 0, nil
		}
		return 0, fmt.Errorf("%w: its trust bundle has sequence %d, and this one's %d", ErrOlder, d.bundle.Sequence, before.Sequence)
	}
	return m.put(ctx, s, d)
}

func (m *Mirror) put(ctx context.Context, s State, d decoded) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.Revision < m.applied {
		return 0, nil
	}
	var cmps []store.Cmp
	var ops []store.Op
	for _, record := range []store.KV{
		{Key: trust.Key, Value: s.TrustBundle},
		{Key: trust.AuthoritiesKey, Value: s.Authorities},
		{Key: replica.Prefix + d.record.Name, Value: s.Record},
	} {
		kv, _, err := m.Store.Get(ctx, record.Key)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return 0, fmt.Errorf("read %s: %w", record.Key, err)
		}
		if err == nil && bytes.Equal(kv.Value, record.Value) {
			continue
		}
		cmps = append(cmps, store.Cmp{Key: record.Key, ModRevision: kv.ModRevision})
		ops = append(ops, store.Put(record.Key, record.Value))
		if record.Key == replica.Prefix+d.record.Name {
			ops = append(ops, replica.Mark()) // its policy key may be certified anew
		}
	}
	m.applied = s.Revision
	if len(ops) == 0 {
		return 0, nil
	}
	res, err := m.Store.Txn(ctx, cmps, ops, nil)
	if err != nil {
		return 0, fmt.Errorf("write what the CA above says: %w", err)
	}
	if !res.Succeeded {
		return 0, errors.New("write what the CA above says: somebody else has changed it, who must not")
	}
	return res.Revision, nil
}

// Import takes revocations over into the store of realm own, with what follows from
// each.
func (m *Mirror) Import(ctx context.Context, own uint32, records []revocation.Shared, now time.Time) error {
	for _, r := range records {
		if !r.ExpiresAt.After(now) {
			continue
		}
		cmp, ops, err := revocation.Import(r, own, now)
		if err != nil {
			return err
		}
		if _, err := m.Store.Txn(ctx, []store.Cmp{cmp}, ops, nil); err != nil { // where it is there, all is done
			return fmt.Errorf("write a revocation of the CA above: %w", err)
		}
	}
	return nil
}

// Follows writes down that everything up to revision is here.
func (m *Mirror) Follows(ctx context.Context, revision uint64) error {
	b, err := json.Marshal(storedSeen{encodingVersion, revision})
	if err != nil {
		return fmt.Errorf("encode how far the CA above is followed: %w", err)
	}
	if _, err := m.Store.Txn(ctx, nil, []store.Op{store.Put(seenKey, b)}, nil); err != nil {
		return fmt.Errorf("write how far the CA above is followed: %w", err)
	}
	return nil
}

// Withdraw makes this CA one that was evicted: it serves nobody any more.
func (m *Mirror) Withdraw(ctx context.Context, name string) error {
	if _, err := m.Store.Txn(ctx, nil, []store.Op{store.Delete(replica.Prefix + name)}, nil); err != nil {
		return fmt.Errorf("write down that this CA was evicted: %w", err)
	}
	return nil
}

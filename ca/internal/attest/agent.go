// Package attest proves nodes: it checks the evidence that an agent sends and
// keeps the record that makes an agent live. Evidence is used up in the very
// transaction that writes the record, so that a crash in between leaves
// neither a used-up token without an agent nor an agent without a token spent.
// One file per kind of evidence.
package attest

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
)

// Where the store keeps agents, and the handles that are taken.
const (
	AgentPrefix  = "agent/"
	handlePrefix = "handle/"
)

const (
	encodingVersion = 1
	// standingVersion is that of a record which takes something away. A Merlon that
	// does not know it leaves the agent out, and lets nobody in for it.
	standingVersion = 2
	maxAttempts     = 16
	handleBits      = 48
)

// ErrUnknownAgent is returned when no live agent has the given ID.
var ErrUnknownAgent = errors.New("agent not attested")

// Agent is a node that has been attested.
type Agent struct {
	ID spiffeid.ID
	// Handle is the 48-bit number with which every serial issued through the
	// agent begins. It stays the same when the node attests again.
	Handle      uint64
	Attestation string // the kind of its evidence: "join_token"
	// Selectors are what the evidence proved of the node, in order.
	Selectors  []entry.Selector
	AttestedAt time.Time
	// NotAfter is the end of its X509-SVID that lives longest.
	NotAfter time.Time
	// TrustSequence is that of the trust bundle that it acknowledged last, as far
	// as something hung on it.
	TrustSequence uint64
	// TrustSince is when it acknowledged that.
	TrustSince time.Time
	// LastSerial is that of its newest X509-SVID, PriorSerial that of the one which
	// asked for it; empty until it renews for the first time.
	LastSerial, PriorSerial string
	// LastKeyID names the key of the newest, "" for that of its attestation.
	LastKeyID string
	// Standing is what an operator decided about it, when, and why.
	Standing      Standing
	StandingSince time.Time
	StandingNote  string
	// AttestedRevision is the store revision at which it attested last, Revision
	// that of the record.
	AttestedRevision, Revision uint64

	// once: its evidence makes no agent live that is there, unless it was evicted.
	once bool
}

type storedAgent struct {
	Version     int         `json:"v"`
	ID          spiffeid.ID `json:"spiffe_id"`
	Handle      uint64      `json:"handle"`
	Attestation string      `json:"attestation"`
	Selectors   []string    `json:"selectors,omitempty"`
	AttestedAt  time.Time   `json:"attested_at"`
	NotAfter    time.Time   `json:"not_after"`

	TrustSequence    uint64    `json:"trust_sequence,omitempty"`
	TrustSince       time.Time `json:"trust_since,omitzero"`
	AttestedRevision uint64    `json:"attested_revision,omitempty"` // 0: that of the record, which nobody has written since

	LastSerial  string `json:"last_serial,omitempty"`
	PriorSerial string `json:"prior_serial,omitempty"`
	LastKeyID   string `json:"last_key_id,omitempty"`

	Standing      Standing  `json:"standing,omitempty"`
	StandingSince time.Time `json:"standing_since,omitzero"`
	StandingNote  string    `json:"standing_note,omitempty"`
}

// DecodeAgent reads an agent's record.
func DecodeAgent(kv store.KV) (*Agent, error) {
	var s storedAgent
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode the record of %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion && s.Version != standingVersion || s.Handle == 0 || s.Handle >= 1<<handleBits {
		return nil, fmt.Errorf("decode the record of %s: version %d, handle %d", kv.Key, s.Version, s.Handle)
	}
	if err := checkStanding(s.Standing); err != nil {
		return nil, fmt.Errorf("decode the record of %s: %w", kv.Key, err)
	}
	selectors, err := decodeSelectors(s.Selectors)
	if err != nil {
		return nil, fmt.Errorf("decode the record of %s: %w", kv.Key, err)
	}
	return &Agent{
		ID: s.ID, Handle: s.Handle, Attestation: s.Attestation, Selectors: selectors,
		AttestedAt: s.AttestedAt, NotAfter: s.NotAfter, TrustSequence: s.TrustSequence, TrustSince: s.TrustSince,
		LastSerial: s.LastSerial, PriorSerial: s.PriorSerial, LastKeyID: s.LastKeyID,
		Standing: s.Standing, StandingSince: s.StandingSince, StandingNote: s.StandingNote,
		AttestedRevision: cmp.Or(s.AttestedRevision, kv.ModRevision), Revision: kv.ModRevision,
	}, nil
}

func (a *Agent) put() (store.Op, error) {
	version := encodingVersion
	if a.Standing != Good {
		version = standingVersion
	}
	b, err := json.Marshal(storedAgent{
		Version: version, ID: a.ID, Handle: a.Handle, Attestation: a.Attestation,
		Selectors: encodeSelectors(a.Selectors), AttestedAt: a.AttestedAt.UTC(), NotAfter: a.NotAfter.UTC(),
		TrustSequence: a.TrustSequence, TrustSince: a.TrustSince, AttestedRevision: a.AttestedRevision,
		LastSerial: a.LastSerial, PriorSerial: a.PriorSerial, LastKeyID: a.LastKeyID,
		Standing: a.Standing, StandingSince: a.StandingSince.UTC(), StandingNote: a.StandingNote,
	})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the record of %s: %w", a.ID, err)
	}
	return store.Put(agentKey(a.ID), b), nil
}

func encodeSelectors(selectors []entry.Selector) []string {
	var texts []string
	for _, sel := range selectors {
		texts = append(texts, sel.String())
	}
	return texts
}

func decodeSelectors(texts []string) ([]entry.Selector, error) {
	var selectors []entry.Selector
	for _, text := range texts {
		typ, value, ok := strings.Cut(text, ":")
		if !ok {
			return nil, fmt.Errorf("%.80q is no selector", text)
		}
		selectors = append(selectors, entry.Selector{Type: typ, Value: value})
	}
	return selectors, nil
}

func agentKey(id spiffeid.ID) string {
	name, _ := entry.AgentName(id)
	return AgentPrefix + name
}

func handleKey(handle uint64) string { return fmt.Sprintf("%s%012x", handlePrefix, handle) }

// ErrCloned is returned when two agents show the X509-SVIDs of one.
var ErrCloned = errors.New("its X509-SVID was replaced by a renewal before: two agents share this identity")

// SVID is an agent's own X509-SVID, as far as its record knows it.
type SVID struct {
	Serial   string
	NotAfter time.Time
	// KeyID names its key (authority.KeyID), where it is issued.
	KeyID string
}

// replaced notes that issued is the newest SVID, given for the one called prior.
func (a *Agent) replaced(prior string, issued SVID) {
	a.LastSerial, a.PriorSerial, a.NotAfter, a.LastKeyID = issued.Serial, prior, issued.NotAfter, issued.KeyID
}

// Renewed records that the agent was given the SVID issued for shown. An answer
// that got lost is asked for again with the same one, so the newest may renew, and
// the one that it replaced. Any older one is a copy: its owner went on. An SVID that
// ends after all that is recorded was issued while the store took no writes.
func Renewed(ctx context.Context, st store.Store, id spiffeid.ID, shown, issued SVID) error {
	return act(ctx, st, id, func(a *Agent) error {
		known := a.LastSerial == "" || shown.Serial == a.LastSerial || shown.Serial == a.PriorSerial
		if !known && !shown.NotAfter.After(a.NotAfter) {
			return ErrCloned
		}
		a.replaced(shown.Serial, issued)
		return nil
	})
}

// CaughtUp records that the agent was given the SVID issued for shown, which is zero
// where that is not known any more, while the store took no writes. What is recorded
// of a later one stays.
func CaughtUp(ctx context.Context, st store.Store, id spiffeid.ID, shown, issued SVID) error {
	return act(ctx, st, id, func(a *Agent) error {
		if issued.NotAfter.After(a.NotAfter) {
			a.LastSerial, a.PriorSerial, a.NotAfter = issued.Serial, cmp.Or(shown.Serial, a.LastSerial), issued.NotAfter
		}
		return nil
	})
}

// Acknowledged records the trust bundle that the agent serves, which showed an SVID.
func Acknowledged(ctx context.Context, st store.Store, id spiffeid.ID, sequence uint64, shown SVID) error {
	return act(ctx, st, id, func(a *Agent) error {
		if a.TrustSequence != sequence {
			a.TrustSequence, a.TrustSince = sequence, time.Now().UTC()
		}
		if shown.NotAfter.After(a.NotAfter) { // its renewal could not be noted
			a.replaced(a.LastSerial, shown)
		}
		return nil
	})
}

// act writes down what an agent did, unless it may not act any more.
func act(ctx context.Context, st store.Store, id spiffeid.ID, edit func(*Agent) error) error {
	_, err := change(ctx, st, id, func(a *Agent) ([]store.Op, error) {
		if err := a.Fault(); err != nil {
			return nil, err
		}
		return nil, edit(a)
	})
	return err
}

// change writes an agent's record anew, and what edit returns with it in one
// transaction.
func change(ctx context.Context, st store.Store, id spiffeid.ID, edit func(*Agent) ([]store.Op, error)) (*Agent, error) {
	for range maxAttempts {
		kv, _, err := st.Get(ctx, agentKey(id))
		if errors.Is(err, store.ErrNotFound) {
			return nil, ErrUnknownAgent
		}
		if err != nil {
			return nil, fmt.Errorf("read the record of %s: %w", id, err)
		}
		a, err := DecodeAgent(kv)
		if err != nil {
			return nil, err
		}
		with, err := edit(a)
		if err != nil {
			return nil, err
		}
		op, err := a.put()
		if err != nil {
			return nil, err
		}
		res, err := st.Txn(ctx, []store.Cmp{{Key: kv.Key, ModRevision: kv.ModRevision}}, append(with, op), nil)
		if err != nil {
			return nil, fmt.Errorf("write the record of %s: %w", id, err)
		}
		if res.Succeeded {
			a.Revision = res.Revision
			return a, nil
		}
	}
	return nil, fmt.Errorf("write the record of %s: others keep changing it", id)
}

// commit makes a the live agent with its ID, if cmps hold, together with ops. It
// says no when something that it rests on changed meanwhile.
func commit(ctx context.Context, st store.Store, a *Agent, cmps []store.Cmp, ops []store.Op) (bool, error) {
	ownCmps, ownOps, err := enroll(ctx, st, a)
	if err != nil {
		return false, err
	}
	res, err := st.Txn(ctx, append(ownCmps, cmps...), append(ownOps, ops...), nil)
	if err != nil {
		return false, fmt.Errorf("write the record of %s: %w", a.ID, err)
	}
	a.Revision, a.AttestedRevision = res.Revision, res.Revision
	return res.Succeeded, nil
}

// enroll prepares the transaction that makes a the live agent with its ID: a
// known node keeps its handle, a new one gets a handle that nobody has had, and a
// banned one is refused, whatever evidence it has. The evidence is not used up
// then. The record that was read is compared, so a ban that comes meanwhile holds.
func enroll(ctx context.Context, st store.Store, a *Agent) ([]store.Cmp, []store.Op, error) {
	key := agentKey(a.ID)
	kv, _, err := st.Get(ctx, key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, nil, fmt.Errorf("read the record of %s: %w", a.ID, err)
	}
	var cmps []store.Cmp
	var ops []store.Op
	if errors.Is(err, store.ErrNotFound) {
		a.Handle = newHandle()
		taken := handleKey(a.Handle)
		cmps = []store.Cmp{{Key: key}, {Key: taken}}
		ops = []store.Op{store.Put(taken, []byte(a.ID.String()))}
	} else {
		before, err := DecodeAgent(kv)
		if err != nil {
			return nil, nil, err
		}
		if before.Standing == Banned {
			return nil, nil, fmt.Errorf("%s: %w", a.ID, ErrBanned)
		}
		if a.once && before.Standing != Evicted {
			return nil, nil, fmt.Errorf("%s: %w", a.ID, ErrAttestedOnce)
		}
		a.Handle = before.Handle
		cmps = []store.Cmp{{Key: key, ModRevision: kv.ModRevision}}
	}
	put, err := a.put()
	if err != nil {
		return nil, nil, err
	}
	return cmps, append(ops, put), nil
}

// newHandle returns 48 random bits, never 0: that is the CA's own.
func newHandle() uint64 {
	for {
		var b [8]byte
		rand.Read(b[:]) // never fails, see crypto/rand
		if h := binary.BigEndian.Uint64(b[:]) >> (64 - handleBits); h != 0 {
			return h
		}
	}
}

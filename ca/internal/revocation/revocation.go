// Package revocation keeps the records that withdraw SVIDs before they expire.
// What a record concerns is decided in sdk/svid, by everyone alike; here is how
// it lives in the store.
package revocation

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// Prefix is where the store keeps revocation records.
const Prefix = "revocation/"

const encodingVersion = 1

// Record is a stored revocation. It is immutable.
type Record struct {
	svid.Revocation
	Key string
	// CreatedAt is zero for a record of an older Merlon.
	CreatedAt time.Time
	// Revision is that of the transaction that wrote it.
	Revision uint64
	// Imported: another CA made it, and its limit is of that CA's store.
	Imported bool
	// Derived: it was made because of another one (Import).
	Derived bool

	once    sync.Once
	encoded []byte
}

// Encoded is what encode makes of r for those who are told of it: all are, so it is made
// once. There is one way to encode a record, and nobody writes to what this returns.
func (r *Record) Encoded(encode func(*Record) []byte) []byte {
	r.once.Do(func() { r.encoded = encode(r) })
	return r.encoded
}

type stored struct {
	Version     int       `json:"v"`
	SPIFFEID    string    `json:"spiffe_id,omitempty"`
	AgentID     string    `json:"agent_id,omitempty"`
	AgentHandle uint64    `json:"agent_handle,omitempty"`
	AuthorityID string    `json:"authority_id,omitempty"`
	Serial      string    `json:"serial,omitempty"`
	ExpiresAt   time.Time `json:"expires_at"`
	CreatedAt   time.Time `json:"created_at,omitzero"`
	Note        string    `json:"note,omitempty"`
	// ForGood: also what is issued later is withdrawn.
	ForGood bool `json:"for_good,omitempty"`
	// Realm is that of the store whose revision limits it: this one's, or, of what
	// was imported, another's, whose revision it then names.
	Realm          uint32 `json:"realm,omitempty"`
	Imported       bool   `json:"imported,omitempty"`
	BeforeRevision uint64 `json:"before_revision,omitempty"`
	Derived        bool   `json:"derived,omitempty"`
}

// Put returns the write that stores r under a new key, and that key. The
// record's BeforeRevision is not stored: it is the revision of the
// transaction, so that everything issued from an older picture is concerned
// and nothing issued later. The realm is that of the store.
func Put(realm uint32, r svid.Revocation) (store.Op, string, error) {
	r.Realm = realm
	return put(r, false)
}

// PutForGood is Put for a subject that never comes back, such as the authority
// of an evicted replica: whatever it signs, and when, is withdrawn.
func PutForGood(r svid.Revocation) (store.Op, string, error) { return put(r, true) }

func put(r svid.Revocation, forGood bool) (store.Op, string, error) {
	s := storedOf(r, time.Now())
	s.ForGood = forGood
	var id [idBytes]byte
	rand.Read(id[:]) // never fails, see crypto/rand
	return s.put(Prefix + hex.EncodeToString(id[:]))
}

const idBytes = 16

func storedOf(r svid.Revocation, now time.Time) stored {
	return stored{
		Version: encodingVersion, SPIFFEID: r.SPIFFEID, AgentID: r.AgentID, AgentHandle: r.AgentHandle, Realm: r.Realm,
		AuthorityID: r.AuthorityID, Serial: r.Serial, ExpiresAt: r.ExpiresAt.UTC(), CreatedAt: now.UTC(), Note: r.Note,
	}
}

func (s stored) put(key string) (store.Op, string, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return store.Op{}, "", fmt.Errorf("encode a revocation: %w", err)
	}
	return store.Put(key, b), key, nil
}

// Decode reads a stored record.
func Decode(kv store.KV) (*Record, error) {
	var s stored
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return nil, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	r := &Record{Key: kv.Key, Revision: kv.ModRevision, CreatedAt: s.CreatedAt, Imported: s.Imported, Derived: s.Derived, Revocation: svid.Revocation{
		SPIFFEID: s.SPIFFEID, AgentID: s.AgentID, AgentHandle: s.AgentHandle, Realm: s.Realm,
		AuthorityID: s.AuthorityID, Serial: s.Serial, ExpiresAt: s.ExpiresAt, Note: s.Note,
	}}
	switch {
	case r.Serial != "" || s.ForGood:
	case s.Imported:
		r.BeforeRevision = s.BeforeRevision
	default:
		r.BeforeRevision = kv.ModRevision
	}
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	return r, nil
}

// maxLife is that of any SVID.
const maxLife = 24 * time.Hour

// Life is how long the record was made for: as long as what it concerns could
// still live then.
func (r *Record) Life() time.Duration {
	if r.CreatedAt.IsZero() {
		return maxLife
	}
	return r.ExpiresAt.Sub(r.CreatedAt)
}

// Expired says whether the record concerns no living SVID any more.
func (r *Record) Expired(now time.Time) bool { return !now.Before(r.ExpiresAt) }

// Package revocation keeps the records that withdraw SVIDs before they expire.
// What a record concerns is decided in sdk/svid, by everyone alike; here is how
// it lives in the store.
package revocation

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
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
}

// Put returns the write that stores r under a new key, and that key. The
// record's BeforeRevision is not stored: it is the revision of the
// transaction, so that everything issued from an older picture is concerned
// and nothing issued later.
func Put(r svid.Revocation) (store.Op, string, error) { return put(r, false) }

// PutForGood is Put for a subject that never comes back, such as the authority
// of an evicted replica: whatever it signs, and when, is withdrawn.
func PutForGood(r svid.Revocation) (store.Op, string, error) { return put(r, true) }

func put(r svid.Revocation, forGood bool) (store.Op, string, error) {
	b, err := json.Marshal(stored{
		Version: encodingVersion, SPIFFEID: r.SPIFFEID, AgentID: r.AgentID, AgentHandle: r.AgentHandle,
		AuthorityID: r.AuthorityID, Serial: r.Serial, ExpiresAt: r.ExpiresAt.UTC(), CreatedAt: time.Now().UTC(), Note: r.Note, ForGood: forGood,
	})
	if err != nil {
		return store.Op{}, "", fmt.Errorf("encode a revocation: %w", err)
	}
	var id [16]byte
	rand.Read(id[:]) // never fails, see crypto/rand
	key := Prefix + hex.EncodeToString(id[:])
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
	r := &Record{Key: kv.Key, Revision: kv.ModRevision, CreatedAt: s.CreatedAt, Revocation: svid.Revocation{
		SPIFFEID: s.SPIFFEID, AgentID: s.AgentID, AgentHandle: s.AgentHandle,
		AuthorityID: s.AuthorityID, Serial: s.Serial, ExpiresAt: s.ExpiresAt, Note: s.Note,
	}}
	if r.Serial == "" && !s.ForGood {
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

package policy

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"sync/atomic"
)

// DecisionID names one decision in logs, errors and `merlon explain decision`: in
// text, 24 lower-case hex digits. The zero value names none. It is a value, so that
// a decision costs no allocation.
type DecisionID [12]byte

// Decision IDs are 6 random bytes of this process, then 6 that count from a random
// start: unique, and no secret.
var (
	decisionProcess [6]byte
	decisionCount   atomic.Uint64
)

func init() {
	var start [8]byte
	rand.Read(decisionProcess[:]) // never fails, see crypto/rand
	rand.Read(start[:])
	decisionCount.Store(binary.BigEndian.Uint64(start[:]))
}

// NewDecisionID returns a decision ID that no other call returns, here or in
// another process. It is safe for concurrent use.
func NewDecisionID() (id DecisionID) {
	var count [8]byte
	binary.BigEndian.PutUint64(count[:], decisionCount.Add(1))
	copy(id[:], decisionProcess[:])
	copy(id[6:], count[2:])
	return id
}

// ParseDecisionID reads what String writes, and nothing else.
func ParseDecisionID(s string) (id DecisionID, err error) {
	if len(s) != 2*len(id) {
		return DecisionID{}, fmt.Errorf("decision ID %.40q: it has 24 hex digits", s)
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return DecisionID{}, fmt.Errorf("decision ID %.40q: it has lower-case hex digits only", s)
		}
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return DecisionID{}, fmt.Errorf("decision ID %.40q: %w", s, err)
	}
	return id, nil
}

// IsZero says whether id names no decision.
func (id DecisionID) IsZero() bool { return id == DecisionID{} }

// String is id in 24 lower-case hex digits.
func (id DecisionID) String() string {
	var text [24]byte
	hex.Encode(text[:], id[:])
	return string(text[:])
}

// MarshalText makes JSON carry id as String writes it.
func (id DecisionID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

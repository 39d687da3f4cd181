// Records that go from one CA of a trust domain to another. A record's limit is a
// revision of the store where it was made, and says nothing about what other CAs
// have issued; where it should bind those, each makes one of its own because of
// it, at its own revision.

package revocation

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// Shared is a record as one CA tells another.
type Shared struct {
	svid.Revocation
	// ID is the same everywhere: what follows Prefix in the key.
	ID string
	// Derived: it was made because of another record.
	Derived bool
}

// Share is r for other CAs.
func (r *Record) Share() Shared { return Shared{r.Revocation, r.id(), r.Derived} }

// Key is where the store keeps the record.
func (s Shared) Key() string { return Prefix + s.ID }

// Check says what is wrong with a record that another CA sent.
func (s Shared) Check() error {
	if b, err := hex.DecodeString(s.ID); err != nil || len(b) != idBytes || strings.ToLower(s.ID) != s.ID {
		return fmt.Errorf("revocation %.40q: its ID is not %d bytes in lower-case hex", s.ID, idBytes)
	}
	if s.ExpiresAt.IsZero() || s.Realm > svid.MaxRealm {
		return fmt.Errorf("revocation %s: it has no end, or realm %d, of which there is none", s.ID, s.Realm)
	}
	return s.Validate()
}

// binds says whether the CA of realm own is to make a record of its own because of
// s. A SPIFFE ID means whoever has it, wherever it was issued. An authority means
// what the CA that holds the root says of it: what is below that root is issued
// everywhere. An agent is one CA's, also by its SPIFFE ID, and a serial number one
// SVID's. What has no limit binds all anyway, and what follows from a record is
// followed by none.
func (s Shared) binds(own uint32) bool {
	if s.Derived || s.Realm == own || s.BeforeRevision == 0 {
		return false
	}
	id, err := spiffeid.FromString(s.SPIFFEID)
	_, agent := entry.AgentName(id)
	return err == nil && !agent || s.AuthorityID != "" && s.Realm == 0
}

// Import returns the transaction that takes s over into the store of the CA of
// realm own: s itself, unless it is there, and with it what follows for what was
// issued here.
func Import(s Shared, own uint32, now time.Time) (store.Cmp, []store.Op, error) {
	record := storedOf(s.Revocation, now)
	record.Imported, record.Derived, record.BeforeRevision = true, s.Derived, s.BeforeRevision
	record.ForGood = s.BeforeRevision == 0 && s.Serial == ""
	op, key, err := record.put(s.Key())
	if err != nil {
		return store.Cmp{}, nil, err
	}
	ops := []store.Op{op}
	if s.binds(own) {
		r := s.Revocation
		r.Realm, r.ExpiresAt = own, now.Add(maxLife+time.Minute) // what was issued here until now may live as long
		follows := storedOf(r, now)
		follows.Derived = true
		op, _, err := follows.put(derivedKey(s.ID, own))
		if err != nil {
			return store.Cmp{}, nil, err
		}
		ops = append(ops, op)
	}
	return store.Cmp{Key: key}, ops, nil
}

// derivedKey is the same however often a record comes.
func derivedKey(id string, own uint32) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s in realm %d", id, own))
	return Prefix + hex.EncodeToString(sum[:idBytes])
}

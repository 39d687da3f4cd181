// Which SVIDs were withdrawn before they expired. A revocation is a small record
// about a name and a store revision, never a list of certificates; the set is
// asked on every call, so lookups are by map and touch only records that name
// the peer.

package svid

import (
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Revocation withdraws the SVIDs of one subject. Exactly one of SPIFFEID,
// AgentID, AuthorityID and Serial is set.
type Revocation struct {
	SPIFFEID    string // every SVID of this SPIFFE ID
	AgentID     string // or issued through this agent (its SPIFFE ID), and the agent's own
	AuthorityID string // or signed below this authority: hex subject key ID, or kid of a JWT key
	Serial      string // or the one with this number, lower-case hex

	// AgentHandle is what serial numbers issued through AgentID begin with. Zero:
	// not known; then only SVIDs of AgentID itself are concerned.
	AgentHandle uint64
	// BeforeRevision limits the record to SVIDs whose number says that they were
	// issued from an older revision of the same store, that of Realm. Zero: no
	// limit. Unused for Serial. An SVID whose number says nothing is always
	// concerned.
	BeforeRevision uint64
	Realm          uint32
	// ExpiresAt is when the last SVID that it can concern has expired. Zero: never.
	ExpiresAt time.Time
	Note      string // what the operator said, for humans
}

// Validate says what is wrong with a record that came from outside.
func (r Revocation) Validate() error {
	set := 0
	for _, s := range []string{r.SPIFFEID, r.AgentID, r.AuthorityID, r.Serial} {
		if s != "" {
			set++
		}
	}
	if set != 1 {
		return fmt.Errorf("a revocation names exactly one subject; this one names %d", set)
	}
	for _, id := range []string{r.SPIFFEID, r.AgentID} {
		if id == "" {
			continue
		}
		if _, err := spiffeid.FromString(id); err != nil {
			return fmt.Errorf("revocation of %q: %w", id, err)
		}
	}
	if r.Serial != "" && !isSerial(r.Serial) {
		return fmt.Errorf("revocation of serial %q: not a serial number in lower-case hex", r.Serial)
	}
	if r.AgentHandle > MaxAgent {
		return errors.New("revocation: the agent handle is too large")
	}
	return nil
}

// isSerial: any certificate's number as big.Int writes it, at most 20 octets.
func isSerial(text string) bool {
	n, ok := new(big.Int).SetString(text, 16)
	return ok && n.Sign() > 0 && n.BitLen() <= 160 && n.Text(16) == text
}

// subject is what makes two records the same one.
type subject struct {
	spiffeID, agentID, authorityID, serial string
	agentHandle, beforeRevision            uint64
	realm                                  uint32
}

func (r Revocation) subject() subject {
	return subject{r.SPIFFEID, r.AgentID, r.AuthorityID, r.Serial, r.AgentHandle, r.BeforeRevision, r.Realm}
}

// Revocations is an immutable set, safe for concurrent use. The zero value and
// nil are the empty set.
type Revocations struct {
	records []Revocation

	bySPIFFEID  map[string][]int // SPIFFE ID, also of agents → positions in records
	byAgent     map[uint64][]int // handle → positions
	byAuthority map[string][]int
	bySerial    map[string]int
}

// NewRevocations makes the set of these records. Of two which differ in note
// and expiry only, the one that lives longer stays.
func NewRevocations(records []Revocation) *Revocations {
	return (*Revocations)(nil).With(records...)
}

// With gives the set with these records added. The receiver does not change.
func (r *Revocations) With(added ...Revocation) *Revocations {
	out := &Revocations{
		bySPIFFEID:  make(map[string][]int),
		byAgent:     make(map[uint64][]int),
		byAuthority: make(map[string][]int),
		bySerial:    make(map[string]int),
	}
	at := make(map[subject]int)
	for _, rec := range slices.Concat(r.All(), added) {
		rec.Serial = strings.ToLower(rec.Serial)
		i, known := at[rec.subject()]
		if known {
			if outlives(rec, out.records[i]) {
				out.records[i] = rec
			}
			continue
		}
		at[rec.subject()] = len(out.records)
		out.records = append(out.records, rec)
		out.index(len(out.records) - 1)
	}
	return out
}

func outlives(a, b Revocation) bool {
	return !b.ExpiresAt.IsZero() && (a.ExpiresAt.IsZero() || a.ExpiresAt.After(b.ExpiresAt))
}

func (r *Revocations) index(i int) {
	rec := r.records[i]
	if rec.SPIFFEID != "" {
		r.bySPIFFEID[rec.SPIFFEID] = append(r.bySPIFFEID[rec.SPIFFEID], i)
	}
	if rec.AgentID != "" {
		r.bySPIFFEID[rec.AgentID] = append(r.bySPIFFEID[rec.AgentID], i)
		if rec.AgentHandle != 0 {
			r.byAgent[rec.AgentHandle] = append(r.byAgent[rec.AgentHandle], i)
		}
	}
	if rec.AuthorityID != "" {
		r.byAuthority[rec.AuthorityID] = append(r.byAuthority[rec.AuthorityID], i)
	}
	if rec.Serial != "" {
		r.bySerial[rec.Serial] = i
	}
}

// Concerning gives a record that withdraws the peer's X509-SVID. A nil peer is
// nobody's, so nothing concerns it.
func (r *Revocations) Concerning(p *Peer) (Revocation, bool) {
	if p == nil {
		return Revocation{}, false
	}
	return r.concerning(document{p.ID, p.Serial, p.OurSerial, p.SerialHex, p.AuthorityIDs})
}

// ConcerningJWT gives a record that withdraws a JWT-SVID; its jti is its serial
// number and its key ID the authority.
func (r *Revocations) ConcerningJWT(j *JWT) (Revocation, bool) {
	if j == nil {
		return Revocation{}, false
	}
	return r.concerning(document{j.ID, j.Serial, j.OurSerial, j.SerialHex, []string{j.KeyID}})
}

// document is what revocations know of an SVID of either kind.
type document struct {
	id          spiffeid.ID
	serial      Serial
	ours        bool
	serialHex   string
	authorities []string
}

func (r *Revocations) concerning(d document) (Revocation, bool) {
	if r == nil || len(r.records) == 0 {
		return Revocation{}, false
	}
	if i, ok := r.bySerial[d.serialHex]; ok {
		return r.records[i], true
	}
	if rec, ok := r.firstBefore(r.bySPIFFEID[d.id.String()], d); ok {
		return rec, true
	}
	if d.ours {
		for _, i := range r.byAgent[d.serial.Agent] {
			// Another authority's number may begin with the handle by chance: the
			// agents of a trust domain obtain SVIDs of that trust domain only.
			if rec := r.records[i]; before(rec, d) && sameTrustDomain(rec.AgentID, d.id) {
				return rec, true
			}
		}
	}
	for _, authority := range d.authorities {
		if rec, ok := r.firstBefore(r.byAuthority[authority], d); ok {
			return rec, true
		}
	}
	return Revocation{}, false
}

func (r *Revocations) firstBefore(positions []int, d document) (Revocation, bool) {
	for _, i := range positions {
		if before(r.records[i], d) {
			return r.records[i], true
		}
	}
	return Revocation{}, false
}

// before: was the SVID issued before the record? One that cannot say when is
// concerned, whoever made up its number. One of another realm is not: the
// revisions of two stores have no order.
func before(rec Revocation, d document) bool {
	return rec.BeforeRevision == 0 || !d.ours || d.serial.Realm == rec.Realm && d.serial.Revision < rec.BeforeRevision
}

func sameTrustDomain(agentID string, id spiffeid.ID) bool {
	prefix := id.TrustDomain().IDString() + "/"
	return strings.HasPrefix(agentID, prefix)
}

// All gives a copy of the records, in the order in which they were added.
func (r *Revocations) All() []Revocation {
	if r == nil {
		return nil
	}
	return slices.Clone(r.records)
}

// Len is the number of records.
func (r *Revocations) Len() int {
	if r == nil {
		return 0
	}
	return len(r.records)
}

// Prune gives the set without the records that no living SVID can be concerned
// by any more. The receiver does not change.
func (r *Revocations) Prune(now time.Time) *Revocations {
	kept := slices.DeleteFunc(r.All(), func(rec Revocation) bool {
		return !rec.ExpiresAt.IsZero() && !rec.ExpiresAt.After(now)
	})
	if len(kept) == r.Len() && r != nil {
		return r
	}
	return NewRevocations(kept)
}

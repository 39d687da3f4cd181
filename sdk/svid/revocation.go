// Which SVIDs were withdrawn before they expired. A revocation is a small record
// about a name and a store revision, never a list of certificates; the set is
// asked on every call, so lookups are by map and touch only records that name
// the peer.

package svid

import (
	"cmp"
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
//
// The records are in layers, each more than merge times as large as the next: a
// record that is added costs a share of a few moves, whatever the set holds, and a
// look-up looks into few.
type Revocations struct {
	layers []*layer // the oldest, and largest, first
	count  int      // of different records
	// first is when the first record expires; zero: none does.
	first time.Time
}

// merge is how many times the size of what follows it a layer keeps being one.
const merge = 8

// layer is some of the records with their indexes. It does not change once it is in
// a set.
type layer struct {
	records []Revocation

	bySPIFFEID  map[string][]int // SPIFFE ID, also of agents → positions in records
	byAgent     map[uint64][]int // handle → positions
	byAuthority map[string][]int
	bySerial    map[string][]int
}

// NewRevocations makes the set of these records. Of two which differ in note
// and expiry only, the one that lives longer stays.
func NewRevocations(records []Revocation) *Revocations {
	return (*Revocations)(nil).With(records...)
}

// With gives the set with these records added. The receiver does not change.
func (r *Revocations) With(added ...Revocation) *Revocations {
	out := &Revocations{}
	if r != nil {
		*out = *r
	}
	top := &layer{}
	for _, rec := range added {
		rec.Serial = strings.ToLower(rec.Serial)
		known, ok := out.known(rec)
		if ok && !outlives(rec, known) {
			continue
		}
		if fresh := top.add(rec); fresh && !ok {
			out.count++
		}
		if !rec.ExpiresAt.IsZero() && (out.first.IsZero() || rec.ExpiresAt.Before(out.first)) {
			out.first = rec.ExpiresAt
		}
	}
	if len(top.records) == 0 {
		return out
	}
	below := len(out.layers)
	size := len(top.records)
	for below > 0 && len(out.layers[below-1].records) <= merge*size {
		below--
		size += len(out.layers[below].records)
	}
	if merged := out.layers[below:]; len(merged) > 0 {
		top = merged[0].with(size, append(slices.Clone(merged[1:]), top)...)
	}
	out.layers = append(slices.Clone(out.layers[:below]), top)
	return out
}

// known is the newest record of the same subject.
func (r *Revocations) known(rec Revocation) (Revocation, bool) {
	for _, l := range slices.Backward(r.layers) {
		if i, ok := l.find(rec); ok {
			return l.records[i], true
		}
	}
	return Revocation{}, false
}

func outlives(a, b Revocation) bool {
	return !b.ExpiresAt.IsZero() && (a.ExpiresAt.IsZero() || a.ExpiresAt.After(b.ExpiresAt))
}

// with is a new layer of what l and newer ones hold, size records at most.
func (l *layer) with(size int, newer ...*layer) *layer {
	out := &layer{records: make([]Revocation, 0, size)}
	for _, from := range append([]*layer{l}, newer...) {
		for _, rec := range from.records {
			out.add(rec)
		}
	}
	return out
}

// add puts a record in, in the place of one of the same subject that it outlives, and
// says whether there was none.
func (l *layer) add(rec Revocation) (fresh bool) {
	if i, ok := l.find(rec); ok {
		if outlives(rec, l.records[i]) {
			l.records[i] = rec
		}
		return false
	}
	i := len(l.records)
	l.records = append(l.records, rec)
	if rec.SPIFFEID != "" {
		put(&l.bySPIFFEID, rec.SPIFFEID, i)
	}
	if rec.AgentID != "" {
		put(&l.bySPIFFEID, rec.AgentID, i)
		if rec.AgentHandle != 0 {
			put(&l.byAgent, rec.AgentHandle, i)
		}
	}
	if rec.AuthorityID != "" {
		put(&l.byAuthority, rec.AuthorityID, i)
	}
	if rec.Serial != "" {
		put(&l.bySerial, rec.Serial, i)
	}
	return true
}

// put enters a position; most sets have records of one kind, and one map.
func put[K comparable](m *map[K][]int, key K, position int) {
	if *m == nil {
		*m = make(map[K][]int)
	}
	(*m)[key] = append((*m)[key], position)
}

// find is the position of the record of the same subject.
func (l *layer) find(rec Revocation) (int, bool) {
	if at := l.bySerial[rec.Serial]; len(at) > 0 {
		return at[0], true
	}
	positions := l.byAuthority[rec.AuthorityID]
	if name := cmp.Or(rec.SPIFFEID, rec.AgentID); name != "" {
		positions = l.bySPIFFEID[name]
	}
	for _, i := range positions {
		if l.records[i].subject() == rec.subject() {
			return i, true
		}
	}
	return 0, false
}

// Concerning gives a record that withdraws the peer's X509-SVID. A nil peer is
// nobody's, so nothing concerns it.
func (r *Revocations) Concerning(p *Peer) (Revocation, bool) {
	if p == nil {
		return Revocation{}, false
	}
	return r.concerning(document{p.ID, p.Serial, p.OurSerial, p.SerialHex, p.AuthorityIDs})
}

// PeerBySerial is what revocations can know of somebody whose certificate only somebody
// else has seen: the SPIFFE ID, and the serial number in hex. Without a readable number
// every record that names the SPIFFE ID concerns it.
func PeerBySerial(id spiffeid.ID, serialHex string) *Peer {
	p := &Peer{ID: id, SerialHex: serialHex}
	if n, ok := new(big.Int).SetString(serialHex, 16); ok {
		p.Serial, p.OurSerial = SerialFromBig(n)
	}
	return p
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
	if r == nil || len(r.layers) == 0 {
		return Revocation{}, false
	}
	id := d.id.String()
	for _, l := range r.layers {
		if rec, ok := l.concerning(d, id); ok {
			return rec, true
		}
	}
	return Revocation{}, false
}

func (l *layer) concerning(d document, id string) (Revocation, bool) {
	if at := l.bySerial[d.serialHex]; len(at) > 0 {
		return l.records[at[0]], true
	}
	if rec, ok := l.firstBefore(l.bySPIFFEID[id], d); ok {
		return rec, true
	}
	if d.ours {
		for _, i := range l.byAgent[d.serial.Agent] {
			// Another authority's number may begin with the handle by chance: the
			// agents of a trust domain obtain SVIDs of that trust domain only.
			if rec := l.records[i]; before(rec, d) && sameTrustDomain(rec.AgentID, d.id) {
				return rec, true
			}
		}
	}
	for _, authority := range d.authorities {
		if rec, ok := l.firstBefore(l.byAuthority[authority], d); ok {
			return rec, true
		}
	}
	return Revocation{}, false
}

func (l *layer) firstBefore(positions []int, d document) (Revocation, bool) {
	for _, i := range positions {
		if before(l.records[i], d) {
			return l.records[i], true
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
	if r == nil || len(r.layers) == 0 {
		return nil
	}
	if len(r.layers) == 1 {
		return slices.Clone(r.layers[0].records)
	}
	return r.layers[0].with(r.count, r.layers[1:]...).records
}

// Len is the number of records.
func (r *Revocations) Len() int {
	if r == nil {
		return 0
	}
	return r.count
}

// Earliest is the earliest that it can be at now, for a process that runs since begun:
// no later than its wall clock says, and no later than it said then and has passed since.
// What is forgotten for its age is forgotten by that. A wall clock that jumps ahead, and
// is set right, would bring back to life what was revoked (SECURITY.md T41).
func Earliest(begun, now time.Time) time.Time {
	return earliest(begun.Round(0), now.Round(0), now.Sub(begun))
}

func earliest(begun, now time.Time, passed time.Duration) time.Time {
	if steady := begun.Add(passed); steady.Before(now) {
		return steady
	}
	return now
}

// Prune gives the set without the records that no living SVID can be concerned
// by any more at now (see Earliest), which costs as much as to make it anew where there
// are any. The receiver does not change.
func (r *Revocations) Prune(now time.Time) *Revocations {
	expired := func(rec Revocation) bool { return !rec.ExpiresAt.IsZero() && !rec.ExpiresAt.After(now) }
	if r == nil || r.first.IsZero() || r.first.After(now) {
		return cmp.Or(r, &Revocations{})
	}
	return NewRevocations(slices.DeleteFunc(r.All(), expired))
}

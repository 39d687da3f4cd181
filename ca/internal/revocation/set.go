// The live records, indexed by what they name, by revision and by expiry:
// adding or dropping one costs next to the same however many there are.

package revocation

import (
	"fmt"
	"time"

	"merlon.dev/ca/internal/index"
	"merlon.dev/sdk/svid"
)

// Set holds records. It is immutable and safe for concurrent use; the zero
// value is empty.
type Set struct {
	byKey, byRevision, byExpiry, bySubject index.Tree[*Record]
}

// With returns the set with r, in place of a record with the same key.
func (s Set) With(r *Record) Set {
	s = s.Without(r.Key)
	s.byKey = s.byKey.With(index.ID(0, r.id()), r)
	s.byRevision = s.byRevision.With(index.ID(r.Revision, r.id()), r)
	s.byExpiry = s.byExpiry.With(index.ID(index.Time(r.ExpiresAt), r.id()), r)
	for _, subject := range subjectsOf(r.Revocation) {
		s.bySubject = s.bySubject.With(index.ID(index.Hash(subject), r.id()), r)
	}
	return s
}

// Without returns the set without the record of the given key, if it is there.
func (s Set) Without(key string) Set {
	r, ok := s.byKey.Get(index.ID(0, (&Record{Key: key}).id()))
	if !ok {
		return s
	}
	s.byKey = s.byKey.Without(index.ID(0, r.id()))
	s.byRevision = s.byRevision.Without(index.ID(r.Revision, r.id()))
	s.byExpiry = s.byExpiry.Without(index.ID(index.Time(r.ExpiresAt), r.id()))
	for _, subject := range subjectsOf(r.Revocation) {
		s.bySubject = s.bySubject.Without(index.ID(index.Hash(subject), r.id()))
	}
	return s
}

// id is what is the record's own in its key.
func (r *Record) id() string { return r.Key[min(len(Prefix), len(r.Key)):] }

// After returns the records above revision that live at now, in order of
// revision.
func (s Set) After(revision uint64, now time.Time) []*Record {
	var records []*Record
	for _, r := range s.byRevision.From(index.Key{revision + 1}) {
		if !r.Expired(now) {
			records = append(records, r)
		}
	}
	return records
}

// Holds says whether the record with the given key is there.
func (s Set) Holds(key string) bool {
	_, ok := s.byKey.Get(index.ID(0, (&Record{Key: key}).id()))
	return ok
}

// Expired returns the records that concern nobody any more, if the clock is
// right; it looks at no others.
func (s Set) Expired(now time.Time) []*Record {
	var records []*Record
	for k, r := range s.byExpiry.All() {
		if k[0] > index.Time(now) {
			break
		}
		if r.Expired(now) {
			records = append(records, r)
		}
	}
	return records
}

// Concerning returns a record that withdraws the peer's SVID.
func (s Set) Concerning(p *svid.Peer) (svid.Revocation, bool) {
	if s.Len() == 0 {
		return svid.Revocation{}, false
	}
	var candidates []svid.Revocation
	for _, subject := range subjectsOfPeer(p) {
		for r := range s.bySubject.Group(index.Hash(subject)) {
			candidates = append(candidates, r.Revocation)
		}
	}
	if candidates == nil {
		return svid.Revocation{}, false
	}
	return svid.NewRevocations(candidates).Concerning(p)
}

// Len is the number of records, expired ones included.
func (s Set) Len() int { return s.byKey.Len() }

func subjectsOf(r svid.Revocation) []string {
	switch {
	case r.SPIFFEID != "":
		return []string{"id " + r.SPIFFEID}
	case r.AgentID != "":
		return []string{"id " + r.AgentID, fmt.Sprintf("handle %x", r.AgentHandle)}
	case r.AuthorityID != "":
		return []string{"authority " + r.AuthorityID}
	default:
		return []string{"serial " + r.Serial}
	}
}

func subjectsOfPeer(p *svid.Peer) []string {
	subjects := []string{"id " + p.ID.String(), "serial " + p.SerialHex}
	if p.OurSerial {
		subjects = append(subjects, fmt.Sprintf("handle %x", p.Serial.Agent))
	}
	for _, id := range p.AuthorityIDs {
		subjects = append(subjects, "authority "+id)
	}
	return subjects
}

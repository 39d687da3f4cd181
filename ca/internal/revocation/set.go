// The live records, indexed by what they name: adding one costs the same
// however many there are.

package revocation

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"merlon.dev/sdk/svid"
)

// Set holds records in order of revision. The zero value is empty. It is not
// safe for concurrent use.
type Set struct {
	records   []*Record
	bySubject map[string][]*Record
}

// Add adds r, whose revision is not below that of any record in the set.
func (s *Set) Add(r *Record) {
	if s.bySubject == nil {
		s.bySubject = make(map[string][]*Record)
	}
	s.records = append(s.records, r)
	for _, subject := range subjectsOf(r.Revocation) {
		s.bySubject[subject] = append(s.bySubject[subject], r)
	}
}

// Remove drops the records with the given keys.
func (s *Set) Remove(keys map[string]bool) {
	kept := slices.DeleteFunc(slices.Clone(s.records), func(r *Record) bool { return keys[r.Key] })
	*s = NewSet(kept)
}

// NewSet makes a set of records in any order.
func NewSet(records []*Record) Set {
	records = slices.Clone(records)
	slices.SortFunc(records, func(a, b *Record) int { return cmp.Compare(a.Revision, b.Revision) })
	var s Set
	for _, r := range records {
		s.Add(r)
	}
	return s
}

// After returns the records above revision that live at now, in order.
func (s *Set) After(revision uint64, now time.Time) []*Record {
	i, _ := slices.BinarySearchFunc(s.records, revision+1, func(r *Record, rev uint64) int { return cmp.Compare(r.Revision, rev) })
	return slices.DeleteFunc(slices.Clone(s.records[i:]), func(r *Record) bool { return r.Expired(now) })
}

// Expired returns the keys of the records that concern nobody any more.
func (s *Set) Expired(now time.Time) []string {
	var keys []string
	for _, r := range s.records {
		if r.Expired(now) {
			keys = append(keys, r.Key)
		}
	}
	return keys
}

// Concerning returns a record that withdraws the peer's SVID.
func (s *Set) Concerning(p *svid.Peer) (svid.Revocation, bool) {
	var candidates []svid.Revocation
	for _, subject := range subjectsOfPeer(p) {
		for _, r := range s.bySubject[subject] {
			candidates = append(candidates, r.Revocation)
		}
	}
	if candidates == nil {
		return svid.Revocation{}, false
	}
	return svid.NewRevocations(candidates).Concerning(p)
}

// Len is the number of records, expired ones included.
func (s *Set) Len() int { return len(s.records) }

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

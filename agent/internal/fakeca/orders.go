// What a test tells the CA, and what it asks it afterwards.

package fakeca

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/bundle"
	"merlon.dev/sdk/svid/forge"
)

// SetTTL sets how long SVIDs live that are issued from now on.
func (ca *CA) SetTTL(workloads, agents time.Duration) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.svidTTL, ca.agentTTL = workloads, agents
}

// HoldSync makes new streams say nothing until called with false.
func (ca *CA) HoldSync(hold bool) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.holdSync = hold
}

// FailSign makes requests to sign fail with err; nil ends it.
func (ca *CA) FailSign(err error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.signErr = err
}

// Counts says how often evidence arrived, how many requests to sign X509-SVIDs,
// and how many of those were signed.
func (ca *CA) Counts() (attests, signs, signed int) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.attests, ca.signs, ca.signed
}

// LastAck is the newest acknowledgement.
func (ca *CA) LastAck() *capb.SyncAck {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	if len(ca.acks) == 0 {
		return &capb.SyncAck{}
	}
	return ca.acks[len(ca.acks)-1]
}

// Resumes lists the resume revisions of all streams so far.
func (ca *CA) Resumes() []uint64 {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return append([]uint64(nil), ca.resumes...)
}

// PutEntry creates or replaces an entry and pushes it.
func (ca *CA) PutEntry(e *capb.Entry) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	e = proto.Clone(e).(*capb.Entry)
	e.Revision = ca.revision
	if e.CreatedAt == nil {
		e.CreatedAt = timestamppb.New(time.Unix(int64(ca.revision), 0))
	}
	ca.entries[e.EntryId] = e
	delete(ca.removed, e.EntryId)
	ca.push(&capb.SyncResponse{Entries: []*capb.Entry{e}})
}

// Entry makes an entry of this trust domain; selectors are "type:value".
func (ca *CA) Entry(id, path string, selectors ...string) *capb.Entry {
	e := &capb.Entry{EntryId: id, SpiffeId: ca.td.IDString() + path}
	for _, s := range selectors {
		for i := range s {
			if s[i] == ':' {
				e.Selectors = append(e.Selectors, &capb.Selector{Type: s[:i], Value: s[i+1:]})
				break
			}
		}
	}
	return e
}

// DeleteEntry deletes an entry and pushes that.
func (ca *CA) DeleteEntry(id string) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	delete(ca.entries, id)
	ca.removed[id] = ca.revision
	ca.push(&capb.SyncResponse{RemovedEntryIds: []string{id}})
}

// Revoke adds a record, filling in its revision, and pushes it.
func (ca *CA) Revoke(r *capb.Revocation) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	r = proto.Clone(r).(*capb.Revocation)
	r.BeforeRevision = ca.revision
	ca.revocations = append(ca.revocations, r)
	ca.push(&capb.SyncResponse{Revocations: []*capb.Revocation{r}})
}

// PublishPolicy serves a signed policy bundle and announces it.
func (ca *CA) PublishPolicy(raw []byte, pb *capb.PolicyBundle) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.published = &bundle.Published{Raw: raw, ETag: fmt.Sprintf(`"%d"`, pb.Generation), Generation: pb.Generation}
	ca.policy = pb
	ca.push(&capb.SyncResponse{PolicyBundle: pb})
}

// PublishCandidate serves raw as the candidate that pb announces, beside what is
// published.
func (ca *CA) PublishCandidate(raw []byte, pb *capb.PolicyBundle) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.candidate = &bundle.Published{Raw: raw, ETag: fmt.Sprintf(`"c%d"`, pb.GetCandidate().GetGeneration()), Generation: pb.GetCandidate().GetGeneration()}
	ca.policy = pb
	ca.push(&capb.SyncResponse{PolicyBundle: pb})
}

// PolicyReports are what agents said of the policy on their nodes.
func (ca *CA) PolicyReports() []*capb.PolicyReport {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return slices.Clone(ca.reports)
}

// RaiseTrust pushes the trust bundle under the next sequence number.
func (ca *CA) RaiseTrust() uint64 {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.sequence++
	ca.push(&capb.SyncResponse{TrustBundle: ca.trustBundle()})
	return ca.sequence
}

// Federate makes these the trust bundles of all other trust domains, and pushes
// them.
func (ca *CA) Federate(others ...*forge.Authority) {
	ca.tb.Helper()
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.revision++
	ca.federated = &capb.FederatedBundles{}
	for _, other := range others {
		jwks, err := other.Bundle().Marshal()
		if err != nil {
			ca.tb.Fatal(err)
		}
		ca.federated.TrustBundles = append(ca.federated.TrustBundles, &capb.TrustBundle{TrustDomain: other.TrustDomain.Name(), Jwks: jwks})
	}
	ca.push(&capb.SyncResponse{FederatedBundles: ca.federated})
}

// push sends a change to the streams of all replicas that would hear of it.
// mu is held.
func (ca *CA) push(m *capb.SyncResponse) {
	m.Revision, m.Synced, m.SentAt = ca.revision, true, timestamppb.Now()
	for _, replica := range ca.replicas {
		if replica.cutOff {
			continue
		}
		for ch := range replica.streams {
			ch <- m
		}
	}
}

func (ca *CA) trustBundle() *capb.TrustBundle {
	jwks, err := ca.Root.Bundle().Marshal()
	if err != nil {
		ca.tb.Error(err)
	}
	return &capb.TrustBundle{TrustDomain: ca.td.Name(), Sequence: ca.sequence, Jwks: jwks}
}

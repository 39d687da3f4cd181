// The messages of Sync. One is made when the one before is on its way, so that
// a listing of any length costs the CA one message of memory for each agent.

package api

import (
	"iter"

	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/trust"
)

// maxSyncBytes is what one message of a listing may hold before the next begins,
// well below the 4 MiB that gRPC clients take.
const maxSyncBytes = 1 << 20

// messagesOf splits an update into messages of bounded size; only the last one
// says synced.
func (s *Service) messagesOf(u registry.Update) iter.Seq[*capb.SyncResponse] {
	return func(yield func(*capb.SyncResponse) bool) {
		p := packer{yield: yield, msg: &capb.SyncResponse{Reset_: u.Reset}}
		if s.fill(&p, u) {
			// Only with the last message is the agent at the revision. The others say 0:
			// were the stream cut between them, a resumption must not skip the rest.
			p.msg.Revision, p.msg.Synced = u.Revision, true
			yield(p.take())
		}
	}
}

// fill puts u into messages, and says whether all of it is wanted.
func (s *Service) fill(p *packer, u registry.Update) bool {
	if u.Trust != nil {
		b := s.trustToProto(u.Trust)
		if !p.room(proto.Size(b)) {
			return false
		}
		p.msg.TrustBundle = b
	}
	if u.FederatedChanged && !p.federated(u.Federated) {
		return false
	}
	// Revocations first: an agent must not serve an entry that they concern.
	for _, r := range u.Revocations {
		wire := r.Encoded(onWire)
		if wire == nil { // Send says why, and ends the stream: none is left out
			p.msg.Revocations = append(p.msg.Revocations, revocationToProto(r))
			continue
		}
		if !p.room(len(wire)) {
			return false
		}
		p.wire = append(p.wire, wire...)
	}
	for _, id := range u.Removed {
		if !p.room(len(id) + 4) {
			return false
		}
		p.msg.RemovedEntryIds = append(p.msg.RemovedEntryIds, id)
	}
	for _, e := range u.Entries {
		pe := entryToProto(e)
		if !p.room(proto.Size(pe)) {
			return false
		}
		p.msg.Entries = append(p.msg.Entries, pe)
	}
	for i, h := range u.Heads {
		b := s.policyBundle(h)
		if i > 0 && !p.next() { // a message holds one policy bundle
			return false
		}
		if !p.room(proto.Size(b)) {
			return false
		}
		p.msg.PolicyBundle = b
	}
	return true
}

// onWire is r in the encoding of a SyncResponse that has nothing else, which is a part of
// any that has r; nil: it cannot be encoded.
func onWire(r *revocation.Record) []byte {
	wire, err := proto.Marshal(&capb.SyncResponse{Revocations: []*capb.Revocation{revocationToProto(r)}})
	if err != nil {
		return nil
	}
	return wire
}

// packer fills messages one after the other.
type packer struct {
	yield func(*capb.SyncResponse) bool
	msg   *capb.SyncResponse
	wire  []byte // further fields of msg, encoded
	size  int
}

// room sees to it that size more bytes have room in the message; false: nobody
// wants more.
func (p *packer) room(size int) bool {
	if p.size > 0 && p.size+size > maxSyncBytes && !p.next() {
		return false
	}
	p.size += size
	return true
}

// federated puts trust bundles of other trust domains into messages; none at all is
// news too.
func (p *packer) federated(bundles []*trust.Federated) bool {
	p.msg.FederatedBundles = &capb.FederatedBundles{}
	for _, b := range bundles {
		pb := federatedTrust(b)
		if !p.room(proto.Size(pb)) {
			return false
		}
		if p.msg.FederatedBundles == nil { // of the next message
			p.msg.FederatedBundles = &capb.FederatedBundles{}
		}
		p.msg.FederatedBundles.TrustBundles = append(p.msg.FederatedBundles.TrustBundles, pb)
	}
	return true
}

func (p *packer) next() bool { return p.yield(p.take()) }

// take ends a message. Encoded fields go as those that this program does not know do: as
// they are.
func (p *packer) take() *capb.SyncResponse {
	done := p.msg
	if len(p.wire) > 0 {
		done.ProtoReflect().SetUnknown(p.wire)
	}
	p.msg, p.wire, p.size = &capb.SyncResponse{}, nil, 0
	return done
}

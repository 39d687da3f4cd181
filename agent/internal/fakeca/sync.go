// What an agent is sent: everything, or what changed since, and what comes then.

package fakeca

import (
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

// Sync implements capb.NodeServer.
func (ca *CA) Sync(stream capb.Node_SyncServer) error {
	if err := requireAgent(stream.Context()); err != nil {
		return err
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := ca.look(first.GetSeen()); err != nil {
		return err
	}
	var receiving sync.WaitGroup
	defer receiving.Wait()
	asked := make(chan uint64, 1)
	receiving.Go(func() {
		for m := first; ; {
			if ask := m.GetAsk(); ask > 1 { // the first is answered by whatever is said first
				select {
				case asked <- ask:
				default:
				}
			}
			ca.mu.Lock()
			if m.GetAck() != nil {
				ca.acks = append(ca.acks, m.GetAck())
			}
			if m.GetPolicyReport() != nil {
				ca.reports = append(ca.reports, m.GetPolicyReport())
			}
			ca.mu.Unlock()
			if m, err = stream.Recv(); err != nil {
				return
			}
		}
	})
	for ca.holding() {
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	changes, listing := ca.subscribe(first.GetResumeRevision())
	defer func() {
		ca.mu.Lock()
		defer ca.mu.Unlock()
		delete(ca.streams, changes)
	}()
	for _, m := range listing {
		if err := say(stream, m, 0); err != nil {
			return err
		}
	}
	for {
		var m *capb.SyncResponse
		var answers uint64
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case m = <-changes:
		case answers = <-asked:
			m = ca.heartbeat()
		}
		if err := say(stream, m, answers); err != nil {
			return err
		}
	}
}

// nextWithin is what the CA promises, and does not keep: it says something when there is
// news, and when it is asked.
const nextWithin = 5 * time.Second

// say sends m, which other streams have too.
func say(stream capb.Node_SyncServer, m *capb.SyncResponse, answers uint64) error {
	m = proto.CloneOf(m)
	m.NextWithin, m.Answers = durationpb.New(nextWithin), answers
	return stream.Send(m)
}

// look notes what an agent has seen, and answers as it was told.
func (ca *CA) look(seen *capb.Seen) error {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.seen = append(ca.seen, seen)
	return ca.refusal
}

func (ca *CA) holding() bool {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	return ca.holdSync
}

// subscribe returns everything above a revision, or everything for 0, in
// several messages, and a channel of what comes.
func (ca *CA) subscribe(resume uint64) (chan *capb.SyncResponse, []*capb.SyncResponse) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	ca.resumes = append(ca.resumes, resume)
	changes := make(chan *capb.SyncResponse, 1000)
	ca.streams[changes] = struct{}{}
	revision := ca.revision
	if ca.cutOff {
		revision = ca.frozen
	}
	return changes, ca.messages(resume, revision)
}

// messages says what changed between two revisions; everything from 0. mu is
// held.
func (ca *CA) messages(resume, revision uint64) []*capb.SyncResponse {
	out := []*capb.SyncResponse{{
		Reset_: resume == 0 || resume > revision, TrustBundle: ca.trustBundle(), PolicyBundle: ca.policy, FederatedBundles: ca.federated,
		SentAt: timestamppb.Now(), Stale: ca.cutOff, Opening: ca.opening,
	}}
	if out[0].Reset_ {
		resume = 0
	}
	for _, e := range ca.entries {
		if e.Revision > resume && e.Revision <= revision {
			out = append(out, &capb.SyncResponse{Entries: []*capb.Entry{e}, Stale: ca.cutOff})
		}
	}
	last := &capb.SyncResponse{Revision: revision, Synced: true, SentAt: timestamppb.Now(), Stale: ca.cutOff, UpstreamAge: durationpb.New(ca.upstreamAge)}
	for _, r := range ca.revocations {
		if r.BeforeRevision > resume && r.BeforeRevision <= revision {
			last.Revocations = append(last.Revocations, r)
		}
	}
	for id, removed := range ca.removed {
		if resume > 0 && removed > resume && removed <= revision {
			last.RemovedEntryIds = append(last.RemovedEntryIds, id)
		}
	}
	return append(out, last)
}

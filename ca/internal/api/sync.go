// Sync: every change that concerns a node, pushed to its agent as it is
// committed. Nothing here polls; the heartbeat only tells the agent how fresh
// its picture is.

package api

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/registry"
)

const (
	// heartbeat stays below the 15 s that node.proto promises.
	heartbeat = 10 * time.Second
	// maxSyncBytes is what one message of a listing may hold before the next
	// begins, well below the 4 MiB that gRPC clients take.
	maxSyncBytes = 1 << 20
)

// Sync implements capb.NodeServer.
func (s *Service) Sync(stream grpc.BidiStreamingServer[capb.SyncRequest, capb.SyncResponse]) error {
	ctx := stream.Context()
	caller := callerFrom(ctx)
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := s.checkSeen(ctx, caller, first.GetSeen()); err != nil {
		return err
	}
	witness, err := s.checkLog(ctx, caller, first.GetSeen().GetLogs())
	if err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, catchUpTimeout)
	feed, err := s.registry.Subscribe(waiting, caller.Agent.ID, first.GetResumeRevision())
	cancel()
	if err != nil {
		return s.behind(err)
	}
	defer feed.Close()
	s.noteAck(ctx, feed, caller, first)
	ended := make(chan struct{})
	// The goroutine ends with the stream, whose handler this is.
	go s.receiveAcks(stream, feed, caller, ended)
	return s.push(ctx, stream, feed, caller, witness, ended)
}

func (s *Service) receiveAcks(stream grpc.BidiStreamingServer[capb.SyncRequest, capb.SyncResponse], feed *registry.Feed, caller *Caller, ended chan<- struct{}) {
	defer close(ended)
	for {
		req, err := stream.Recv()
		if err != nil {
			return
		}
		s.noteAck(stream.Context(), feed, caller, req)
	}
}

func (s *Service) noteAck(ctx context.Context, feed *registry.Feed, caller *Caller, req *capb.SyncRequest) {
	if a := req.GetAck(); a != nil {
		feed.Ack(registry.Ack{
			Revision: a.GetRevision(), TrustBundleSequence: a.GetTrustBundleSequence(), PolicyGeneration: a.GetPolicyGeneration(),
		})
		s.keepAck(ctx, feed, caller)
	}
}

const (
	// maxKeeping is how many acknowledgements are written at the same time: with
	// the next key of the trust bundle all agents acknowledge at once.
	maxKeeping  = 64
	keepTimeout = 5 * time.Second
)

// keepAck writes down which trust bundle the agent serves, where a step of an
// authority may wait for that: other replicas learn it so, and a CA that starts
// again. What fails is tried again with the next heartbeat.
func (s *Service) keepAck(ctx context.Context, feed *registry.Feed, caller *Caller) {
	ack, ok := feed.Acked()
	if !ok || s.Stale() || !s.registry.AckDue(caller.Agent.ID, ack.TrustBundleSequence) {
		return
	}
	select {
	case s.keeping <- struct{}{}:
		defer func() { <-s.keeping }()
	case <-ctx.Done():
		return
	}
	ctx, cancel := context.WithTimeout(ctx, keepTimeout)
	defer cancel()
	if err := attest.Acknowledged(ctx, s.opts.Store, caller.Agent.ID, ack.TrustBundleSequence, caller.Peer.NotAfter); err != nil {
		s.log.LogAttrs(ctx, slog.LevelDebug, "acknowledgement not written down yet",
			slog.String("spiffe_id", caller.Name), slog.Any("err", err))
	}
}

// push sends until the stream ends, the agent's SVID ends or is revoked, or
// the CA stops.
func (s *Service) push(ctx context.Context, stream grpc.ServerStreamingServer[capb.SyncResponse], feed *registry.Feed, caller *Caller, witness *witness, ended <-chan struct{}) error {
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	expiry := time.NewTimer(time.Until(caller.Peer.NotAfter))
	defer expiry.Stop()
	var keeping sync.WaitGroup
	defer keeping.Wait()
	reach := s.reach.state.Load()
	for {
		select {
		case <-reach.turned:
		case <-feed.Due():
		case <-beat.C:
			if ack, ok := feed.Acked(); ok && s.registry.AckDue(caller.Agent.ID, ack.TrustBundleSequence) {
				// Beside: a slow store must not hold up what is pushed.
				keeping.Go(func() { s.keepAck(ctx, feed, caller) })
			}
		case <-expiry.C:
		case <-ended:
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-s.stopping:
			return status.Error(codes.Unavailable, "the CA is stopping")
		}
		reach = s.reach.state.Load() // what is sent now is what the next turn is measured by
		update := feed.Take(time.Now())
		if err := s.Standing(); err != nil {
			return err
		}
		// After Take: a revocation in this very update must end the stream.
		if now := s.callerOf(ctx); !now.Is(capb.Caller_CALLER_AGENT) {
			return s.refuse(ctx, now, audit.Record{Detail: capb.Node_Sync_FullMethodName}, now.unauthenticated())
		}
		messages := s.messagesOf(update)
		messages[len(messages)-1].LogCheckpoint = witness.next(ctx)
		for _, msg := range messages {
			msg.SentAt, msg.Stale = timestamppb.Now(), reach.stale
			if s.opts.UpstreamAge != nil {
				msg.UpstreamAge = durationpb.New(s.opts.UpstreamAge(time.Now()))
			}
			if err := stream.Send(msg); err != nil {
				return err
			}
		}
	}
}

// messagesOf splits an update into messages of bounded size; only the last one
// says synced.
func (s *Service) messagesOf(u registry.Update) []*capb.SyncResponse {
	var p packer
	p.start(0).Reset_ = u.Reset
	if u.Trust != nil {
		b := s.trustToProto(u.Trust)
		p.start(proto.Size(b)).TrustBundle = b
	}
	// Revocations first: an agent must not serve an entry that they concern.
	for _, r := range u.Revocations {
		rec := revocationToProto(r)
		msg := p.start(proto.Size(rec))
		msg.Revocations = append(msg.Revocations, rec)
	}
	for _, id := range u.Removed {
		msg := p.start(len(id) + 4)
		msg.RemovedEntryIds = append(msg.RemovedEntryIds, id)
	}
	for _, e := range u.Entries {
		pe := entryToProto(e)
		msg := p.start(proto.Size(pe))
		msg.Entries = append(msg.Entries, pe)
	}
	for i, h := range u.Heads {
		b := s.policyBundle(h)
		if i > 0 {
			p.next() // a message holds one policy bundle
		}
		p.start(proto.Size(b)).PolicyBundle = b
	}
	// Only with the last message is the agent at the revision. The others say 0:
	// were the stream cut between them, a resumption must not skip the rest.
	last := p.messages[len(p.messages)-1]
	last.Revision, last.Synced = u.Revision, true
	return p.messages
}

// packer fills messages one after the other.
type packer struct {
	messages []*capb.SyncResponse
	size     int
}

// start returns the message into which something of size bytes goes.
func (p *packer) start(size int) *capb.SyncResponse {
	if len(p.messages) == 0 || p.size+size > maxSyncBytes {
		p.next()
	}
	p.size += size
	return p.messages[len(p.messages)-1]
}

func (p *packer) next() {
	p.messages = append(p.messages, &capb.SyncResponse{})
	p.size = 0
}

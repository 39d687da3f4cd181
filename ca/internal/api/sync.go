// Sync: every change that concerns a node, pushed to its agent as it is
// committed. Nothing here polls; the heartbeat only tells the agent how fresh
// its picture is.

package api

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/registry"
)

const (
	// takeTimeout is how long an agent may take to take a message: it would stay in
	// memory for it, and an answer to its pings keeps the connection.
	takeTimeout = time.Minute
	// An agent pauses 20 ms between acknowledgements. One that sends more waits
	// until they are read; what is written down of them is bounded further.
	acksPerSecond, acksBurst = 50, 100
	keptPerSecond, keptBurst = 1, 8
)

// Sync implements capb.NodeServer.
func (s *Service) Sync(stream grpc.BidiStreamingServer[capb.SyncRequest, capb.SyncResponse]) error {
	ctx := stream.Context()
	caller := callerFrom(ctx)
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if err := s.checkSeen(ctx, caller, claims(first)); err != nil {
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
	follower := &follower{
		Service: s, stream: stream, feed: feed, caller: caller, witness: witness,
		acks: rate.NewLimiter(acksPerSecond, acksBurst), kept: rate.NewLimiter(keptPerSecond, keptBurst),
		opening: []byte(s.opts.Opening.ID), question: make(chan struct{}, 1), conn: connOf(ctx),
	}
	follower.asked.Store(first.GetAsk())
	follower.noteAck(ctx, first)
	defer s.rollout.Dirty() // it is connected here no more
	ended := make(chan error, 1)
	// The goroutine ends with the stream, whose handler this is.
	go func() { ended <- follower.receiveAcks(ctx) }()
	return follower.push(ctx, ended)
}

// claims are the highest numbers that a message says its agent has seen.
func claims(req *capb.SyncRequest) *capb.Seen {
	seen, ack := req.GetSeen(), req.GetAck()
	return &capb.Seen{
		Revision:            max(seen.GetRevision(), req.GetResumeRevision(), ack.GetRevision()),
		TrustBundleSequence: max(seen.GetTrustBundleSequence(), ack.GetTrustBundleSequence()),
		PolicyGeneration:    max(seen.GetPolicyGeneration(), ack.GetPolicyGeneration()),
		Opening:             seen.GetOpening(),
	}
}

// follower is the agent at the other end of one Sync stream.
type follower struct {
	*Service
	stream     grpc.BidiStreamingServer[capb.SyncRequest, capb.SyncResponse]
	feed       *registry.Feed
	caller     *Caller
	witness    *witness
	acks, kept *rate.Limiter
	opening    []byte // for the first message
	asked      atomic.Uint64
	question   chan struct{} // receives when asked is to be answered
	// conn is what the stream is on; nil: nobody counts what is on its way there.
	conn  *countedConn
	stuck *time.Timer // cuts conn; nil before the first message
}

// receiveAcks notes acknowledgements until the stream ends. One that says more
// than there is ends it: what waits for acknowledgements must not believe it.
func (f *follower) receiveAcks(ctx context.Context) error {
	for {
		req, err := f.stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the agent has gone
		}
		if err := f.acks.Wait(ctx); err != nil {
			return nil //nolint:nilerr // likewise
		}
		if err := f.checkSeen(ctx, f.caller, claims(&capb.SyncRequest{Ack: req.GetAck()})); err != nil {
			return err
		}
		if ask := req.GetAsk(); ask > f.asked.Load() {
			f.asked.Store(ask)
			select {
			case f.question <- struct{}{}:
			default: // it will be answered with the one before
			}
		}
		f.noteAck(ctx, req)
		f.hearPolicy(req.GetPolicyReport())
	}
}

func (f *follower) noteAck(ctx context.Context, req *capb.SyncRequest) {
	if a := req.GetAck(); a != nil {
		f.feed.Ack(registry.Ack{
			Revision: a.GetRevision(), TrustBundleSequence: a.GetTrustBundleSequence(), PolicyGeneration: a.GetPolicyGeneration(),
		})
		f.keepAck(ctx)
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
// again. What fails, or comes too often, is tried again with the next heartbeat.
func (f *follower) keepAck(ctx context.Context) {
	s, caller := f.Service, f.caller
	ack, ok := f.feed.Acked()
	if !ok || s.Stale() || !s.registry.AckDue(caller.Agent.ID, ack.TrustBundleSequence) || !f.kept.Allow() {
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
	if err := attest.Acknowledged(ctx, s.opts.Store, caller.Agent.ID, ack.TrustBundleSequence, shown(caller.Peer)); err != nil {
		s.log.LogAttrs(ctx, slog.LevelDebug, "acknowledgement not written down yet",
			slog.String("spiffe_id", caller.Name), slog.Any("err", err))
	}
}

// push sends until the stream ends, the agent's SVID ends or is revoked, or
// the CA stops.
func (f *follower) push(ctx context.Context, ended <-chan error) error {
	s, feed, caller := f.Service, f.feed, f.caller
	at := s.pulse.join()
	defer at.leave()
	beat, within := at.next()
	expiry := time.NewTimer(time.Until(caller.Peer.NotAfter))
	defer expiry.Stop()
	var keeping sync.WaitGroup
	defer keeping.Wait()
	reach := s.reach.state.Load()
	for {
		select {
		case <-reach.turned:
		case <-feed.Due():
		case <-f.question:
		case <-beat:
			beat, within = at.next()
			if ack, ok := feed.Acked(); ok && s.registry.AckDue(caller.Agent.ID, ack.TrustBundleSequence) {
				// Beside: a slow store must not hold up what is pushed.
				keeping.Go(func() { f.keepAck(ctx) })
			}
		case <-expiry.C:
		case <-feed.Superseded():
			return f.superseded(ctx)
		case err := <-ended:
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-s.stopping:
			return errStopping
		}
		reach = s.reach.state.Load() // what is sent now is what the next turn is measured by
		update := feed.Take(time.Now())
		if err := s.Standing(); err != nil {
			return err
		}
		// After Take: a revocation in this very update must end the stream.
		now := Anonymous()
		if s.resolvePeer(ctx, now, caller.Peer); !now.Is(capb.Caller_CALLER_AGENT) {
			return s.refuse(ctx, now, audit.Record{Detail: capb.Node_Sync_FullMethodName}, now.unauthenticated())
		}
		s.metrics.count(update)
		for msg := range s.messagesOf(update) {
			if msg.GetSynced() {
				msg.LogCheckpoint = f.witness.next(ctx)
			}
			msg.Answers = f.asked.Load() // before the time, which is the answer
			msg.SentAt, msg.Stale = timestamppb.Now(), reach.stale
			msg.NextWithin = durationpb.New(within)
			msg.Opening, f.opening = f.opening, nil
			if s.opts.UpstreamAge != nil {
				msg.UpstreamAge = durationpb.New(s.opts.UpstreamAge(time.Now()))
			}
			if err := f.send(ctx, msg); err != nil {
				return err
			}
		}
	}
}

var errStopping = status.Error(codes.Unavailable, "the CA is stopping")

// send sends one message, and gives the agent up when it does not take it.
func (f *follower) send(ctx context.Context, msg *capb.SyncResponse) error {
	if f.conn.roomy(f.roomBytes) {
		return f.sendAtOnce(ctx, msg)
	}
	return f.sendBeside(ctx, msg)
}

// sendAtOnce is for a message that gRPC has room for, nearly all of them. Should it keep
// the sender waiting all the same, the connection is cut.
func (f *follower) sendAtOnce(ctx context.Context, msg *capb.SyncResponse) error {
	if f.stuck == nil {
		f.stuck = time.AfterFunc(f.takeTimeout, func() { _ = f.conn.Close() }) // gRPC learns of it
	} else {
		f.stuck.Reset(f.takeTimeout)
	}
	err := f.stream.Send(msg)
	if cut := !f.stuck.Stop(); cut {
		return f.takesNothing(ctx)
	}
	return err
}

// sendBeside is for a message that may have to wait. Once the handler returns gRPC ends
// the stream, and the goroutine with it.
func (f *follower) sendBeside(ctx context.Context, msg *capb.SyncResponse) error {
	sent := make(chan error, 1)
	go func() { sent <- f.stream.Send(msg) }()
	patience := time.NewTimer(f.takeTimeout)
	defer patience.Stop()
	select {
	case err := <-sent:
		return err
	case <-f.feed.Superseded():
		return f.superseded(ctx)
	case <-f.stopping:
		return errStopping
	case <-patience.C:
		return f.takesNothing(ctx)
	}
}

// takesNothing ends a stream whose agent lets what it is sent lie.
func (f *follower) takesNothing(ctx context.Context) error {
	return f.refuse(ctx, f.caller, audit.Record{Detail: capb.Node_Sync_FullMethodName},
		status.Errorf(codes.ResourceExhausted, "the agent has taken nothing for %s; it can come again", f.takeTimeout))
}

// superseded ends a stream in favour of newer ones.
func (f *follower) superseded(ctx context.Context) error {
	return f.refuse(ctx, f.caller, audit.Record{Detail: capb.Node_Sync_FullMethodName},
		status.Errorf(codes.ResourceExhausted, "the agent has opened more than %d Sync streams, and this is its oldest", registry.MaxFeeds))
}

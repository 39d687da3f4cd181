// Nested: what this CA shares with those below it that have a store of their own.
// To a rotation a nested CA is what an agent is: it acknowledges a trust bundle
// once everybody below it does, and until then says who does not. What it may do
// beyond that concerns its own JWT keys alone.

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
)

const (
	// maxShared is how many revocations one message carries, either way.
	maxShared = 1000
	// maxBehind is how many agents a nested CA may name.
	maxBehind = 100
)

// errNotBelow says why a CA can have none below it.
var errNotBelow = status.Error(codes.FailedPrecondition, "only the CA whose own root signs can have nested CAs, and this one's is another CA's: make the token there")

// Follow implements capb.NestedServer.
func (s *Service) Follow(stream grpc.BidiStreamingServer[capb.FollowRequest, capb.FollowResponse]) error {
	ctx := stream.Context()
	caller := callerFrom(ctx)
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	seen := first.GetSeen()
	if err := s.checkSeen(ctx, caller, seen); err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	feed, err := s.registry.Subscribe(waiting, s.followerID(caller.Replica.Name), 0)
	if err != nil {
		return s.behind(err)
	}
	defer feed.Close()
	if err := s.hear(ctx, caller, first); err != nil {
		return err
	}
	ended := make(chan error, 1)
	// The goroutine ends with the stream, whose handler this is.
	go func() { ended <- s.listen(stream, caller) }()
	f := following{Service: s, stream: stream, feed: feed, caller: caller, since: seen.GetRevision()}
	if store.Epoch(f.since) != store.Epoch(s.registry.Revision()) {
		f.since = 0 // what it holds may never have been here
	}
	return f.run(ctx, ended)
}

// followerID names the stream of a nested CA. No agent has it.
func (s *Service) followerID(name string) spiffeid.ID {
	return spiffeid.RequireFromSegments(s.opts.TrustDomain, "ca", name) // names of replicas are valid segments
}

// notTold are the other CAs that hear later of what is revoked now.
func (s *Service) notTold(now time.Time) (names []string) {
	if s.opts.UpstreamAge != nil && s.opts.UpstreamAge(now) > 2*heartbeat {
		names = append(names, "the CA above")
	}
	for _, rec := range s.registry.Replicas() {
		if rec.Realm != s.opts.Realm && !s.registry.Subscribed(s.followerID(rec.Name)) {
			names = append(names, "nested CA "+rec.Name)
		}
	}
	return names
}

func (s *Service) listen(stream grpc.BidiStreamingServer[capb.FollowRequest, capb.FollowResponse], caller *Caller) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the stream has ended
		}
		if err := s.hear(stream.Context(), caller, req); err != nil {
			return err
		}
	}
}

// hear takes over what a nested CA says.
func (s *Service) hear(ctx context.Context, caller *Caller, req *capb.FollowRequest) error {
	if len(req.GetBehind()) > maxBehind || len(req.GetRevocations()) > maxShared {
		return status.Errorf(codes.InvalidArgument, "a message names up to %d agents and %d revocations", maxBehind, maxShared)
	}
	if err := s.takeOverAll(ctx, caller, req.GetRevocations()); err != nil {
		return err
	}
	return s.noteProgress(ctx, &replica.Progress{
		Name: caller.Replica.Name, TrustSequence: req.GetTrustBundleSequence(), Behind: req.GetBehind(),
	})
}

// evictedBelow tells a nested CA that it is none any more.
func evictedBelow(name string) error {
	return refused(codes.PermissionDenied, capb.Refusal_REFUSAL_CA_EVICTED, "nested CA "+name+" has been evicted")
}

// WasEvicted says whether a CA was told that it has been evicted. That somebody lets
// it in for nothing does not say so: it may have come to the wrong door.
func WasEvicted(err error) bool {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == refusalDomain && info.GetReason() == reasonOf(capb.Refusal_REFUSAL_CA_EVICTED) {
			return true
		}
	}
	return false
}

// noteProgress writes down which trust bundle is served below, where that is news.
func (s *Service) noteProgress(ctx context.Context, p *replica.Progress) error {
	before := s.registry.Progress(p.Name)
	if before != nil && before.TrustSequence == p.TrustSequence && slices.Equal(before.Behind, p.Behind) {
		return nil
	}
	for _, name := range p.Behind {
		if _, err := s.ownID("behind", name); err != nil {
			return err
		}
	}
	put, err := p.Put()
	if err != nil {
		return err
	}
	rec, ok := s.registry.Replica(p.Name)
	if !ok {
		return evictedBelow(p.Name)
	}
	// The record may be written anew meanwhile; then the next message says it again.
	res, err := s.opts.Store.Txn(ctx, []store.Cmp{rec.Cmp()}, []store.Op{put}, nil)
	if err != nil {
		return fmt.Errorf("write the progress of nested CA %s: %w", p.Name, err)
	}
	if !res.Succeeded {
		return status.Error(codes.Aborted, "the record of the nested CA has changed meanwhile")
	}
	return nil
}

// takeOverAll leaves out, on record, what cannot be taken: the stream goes on, on
// which all others come up, and what is revoked here goes down.
func (s *Service) takeOverAll(ctx context.Context, caller *Caller, all []*capb.SharedRevocation) error {
	var refused []error
	for _, shared := range all {
		err := s.takeOver(ctx, caller, shared)
		if status.Code(err) == codes.InvalidArgument {
			refused = append(refused, s.refuse(ctx, caller, audit.Record{Detail: "take over a revocation of nested CA " + caller.Replica.Name}, err))
		} else if err != nil {
			return err
		}
	}
	if len(refused) > 0 {
		s.log.LogAttrs(ctx, slog.LevelError, "revocations of a nested CA are not taken over, and bind nothing here", slog.String("replica", caller.Replica.Name),
			slog.Int("revocations", len(refused)), slog.Any("first", refused[0]), slog.String("hint", "revoke here what they name: merlon revoke"))
	}
	return nil
}

// takeOver stores a revocation that was made below, and what follows from it here.
// Only one that is no good is an INVALID_ARGUMENT.
func (s *Service) takeOver(ctx context.Context, caller *Caller, p *capb.SharedRevocation) error {
	shared, err := SharedFromProto(p)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	now := time.Now()
	switch {
	case !shared.ExpiresAt.After(now) || s.registry.HoldsRevocation(shared.Key()):
		return nil
	case shared.Serial == "" && (shared.Realm != caller.Replica.Realm || shared.BeforeRevision == 0):
		return status.Errorf(codes.InvalidArgument, "revocation %s: nested CA %s speaks of revisions of its own store, which is realm %d", shared.ID, caller.Replica.Name, caller.Replica.Realm)
	}
	shared.Note = fitNote(shared.Note) // no reason to leave a revocation out
	// Its clock may be ahead; no SVID that there is lives longer.
	if end := now.Add(recordLife); shared.ExpiresAt.After(end) {
		shared.ExpiresAt = end
	}
	cmp, ops, err := revocation.Import(shared, s.opts.Realm, now)
	if err != nil {
		return err
	}
	res, err := s.opts.Store.Txn(ctx, []store.Cmp{cmp}, ops, nil)
	if err != nil {
		return fmt.Errorf("store a revocation of nested CA %s: %w", caller.Replica.Name, err)
	}
	if !res.Succeeded || shared.Derived {
		return nil
	}
	return s.did(ctx, audit.Record{
		Detail: "revoke " + subjectOf(shared.Revocation) + ", as nested CA " + caller.Replica.Name + " did",
		Reason: shared.Note, SPIFFEID: shared.SPIFFEID + shared.AgentID, Serial: shared.Serial,
	})
}

// following is one Follow stream.
type following struct {
	*Service
	stream grpc.BidiStreamingServer[capb.FollowRequest, capb.FollowResponse]
	feed   *registry.Feed
	caller *Caller
	since  uint64            // the caller has every revocation up to here
	state  *capb.SharedState // as it was sent last, without its revision
}

// run pushes until the stream ends, the caller is none any more, or the CA stops.
func (f *following) run(ctx context.Context, ended <-chan error) error {
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	expiry := time.NewTimer(time.Until(f.caller.Peer.NotAfter))
	defer expiry.Stop()
	reach, steps := f.reach.state.Load(), f.registry.StepsTaken()
	for {
		select {
		case <-reach.turned:
		case <-f.feed.Due():
		case <-steps:
		case <-beat.C:
		case <-expiry.C:
		case err := <-ended:
			return err
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-f.stopping:
			return status.Error(codes.Unavailable, "the CA is stopping")
		}
		reach, steps = f.reach.state.Load(), f.registry.StepsTaken() // before the look: no turn and no step is missed
		if err := f.push(ctx, reach.stale); err != nil {
			return err
		}
	}
}

// push sends what is new. One that was evicted is told so by its revocations, and
// by the error that ends the stream.
func (f *following) push(ctx context.Context, stale bool) error {
	update := f.feed.Take(time.Now())
	for _, msg := range f.messages(update) {
		msg.SentAt, msg.Stale = timestamppb.Now(), stale
		if err := f.stream.Send(msg); err != nil {
			return err
		}
	}
	f.since = max(f.since, update.Revision)
	if err := f.Standing(); err != nil {
		return err
	}
	if now := f.callerOf(ctx); !now.Is(capb.Caller_CALLER_NESTED_CA) {
		return f.refuse(ctx, now, audit.Record{Detail: capb.Nested_Follow_FullMethodName}, f.access.authorize(now, capb.Nested_Follow_FullMethodName))
	}
	return nil
}

// messages splits an update; only with the last of them the caller is at its
// revision.
func (f *following) messages(u registry.Update) (all []*capb.FollowResponse) {
	first := &capb.FollowResponse{}
	if state, ok := f.stateOf(f.caller.Replica.Name); ok {
		revision := state.Revision
		if state.Revision = 0; !proto.Equal(state, f.state) {
			f.state, first.State = state, proto.CloneOf(state)
			first.State.Revision = revision
		}
	}
	all = append(all, first)
	now := time.Now()
	for _, r := range u.Revocations {
		if r.Revision <= f.since || r.Expired(now) {
			continue
		}
		last := all[len(all)-1]
		if len(last.GetRevocations()) == maxShared {
			last = &capb.FollowResponse{}
			all = append(all, last)
		}
		last.Revocations = append(last.Revocations, SharedToProto(r.Share()))
	}
	all[len(all)-1].Revision = u.Revision
	return all
}

// stateOf is what the named nested CA shares with this one; false where it is none.
func (s *Service) stateOf(name string) (*capb.SharedState, bool) {
	shared, ok := s.registry.Shared(name)
	if !ok || !shared.Record.Nested() {
		return nil, false
	}
	bundle, err := shared.Trust.Encode()
	set, errSet := shared.Authorities.Encode()
	record, errRecord := shared.Record.Put()
	if err := errors.Join(err, errSet, errRecord); err != nil {
		s.log.LogAttrs(context.Background(), slog.LevelError, "state for a nested CA not encoded", slog.String("replica", name), slog.Any("err", err))
		return nil, false
	}
	return &capb.SharedState{Revision: shared.Revision, TrustBundle: bundle, Authorities: set, Record: record.Value}, true
}

// SharedToProto is r as other CAs read it.
func SharedToProto(r revocation.Shared) *capb.SharedRevocation {
	return &capb.SharedRevocation{Id: r.ID, Derived: r.Derived, Revocation: revocationToProto(&revocation.Record{Revocation: r.Revocation})}
}

// SharedFromProto reads what another CA wrote, and checks it.
func SharedFromProto(p *capb.SharedRevocation) (revocation.Shared, error) {
	pb := p.GetRevocation()
	r := revocation.Shared{ID: p.GetId(), Derived: p.GetDerived()}
	r.SPIFFEID, r.AgentID, r.AuthorityID, r.Serial = pb.GetSpiffeId(), pb.GetAgentId(), pb.GetAuthorityId(), pb.GetSerial()
	r.AgentHandle, r.Realm, r.BeforeRevision, r.Note = pb.GetAgentHandle(), pb.GetRealm(), pb.GetBeforeRevision(), pb.GetNote()
	if t := pb.GetExpiresAt(); t != nil {
		r.ExpiresAt = t.AsTime()
	}
	return r, r.Check()
}

// Step implements capb.NestedServer. What was asked for by force is on record
// before it is done.
func (s *Service) Step(ctx context.Context, req *capb.StepRequest) (*capb.StepResponse, error) {
	caller := callerFrom(ctx)
	c, err := s.commandOf(caller, req, time.Now())
	if err != nil {
		return nil, s.refuse(ctx, caller, audit.Record{Detail: "step of a nested CA"}, s.toStatus(ctx, err))
	}
	about := audit.Record{Detail: fmt.Sprintf("%s authority of nested CA %s", c.Verb, caller.Replica.Name), AuthorityID: c.ID}
	if c.Force {
		about.Detail += " by force"
		begin := about
		begin.Detail, begin.Pending = "begin to "+begin.Detail, true
		if err := s.audit(ctx, byCaller(ctx, begin)); err != nil {
			return nil, err
		}
	}
	revision, err := s.opts.Authorities.TakeFor(ctx, caller.Replica.Name, c)
	if err != nil {
		return nil, err // it waits, mostly, and asks again
	}
	if err := s.did(ctx, about); err != nil {
		return nil, err
	}
	if err := s.registry.Wait(ctx, revision); err != nil {
		return nil, err
	}
	state, ok := s.stateOf(caller.Replica.Name)
	if !ok {
		return nil, evictedBelow(caller.Replica.Name)
	}
	return &capb.StepResponse{State: state}, nil
}

func (s *Service) commandOf(caller *Caller, req *capb.StepRequest, now time.Time) (rotation.Command, error) {
	c := rotation.Command{Verb: rotation.Verb(req.GetVerb()), ID: req.GetAuthorityId(), Force: req.GetForce()}
	if len(c.ID) > maxAuthorityBytes || len(c.Verb) > maxAuthorityBytes {
		return c, &authority.InvalidError{Field: "authority_id", Reason: "is too long"}
	}
	if c.Verb != rotation.Prepare {
		return c, nil
	}
	key, err := authority.PublicKeyFromCSR(req.GetJwtCsr())
	if err != nil {
		return c, fmt.Errorf("jwt_csr: %w", err)
	}
	c.New, err = s.jwtAuthority(caller.Replica.Name, key, now)
	if err != nil {
		return c, err
	}
	c.ID = c.New.ID
	return c, nil
}

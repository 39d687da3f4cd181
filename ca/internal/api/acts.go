// Acts: what administrators do that changes something. Each is one story in the
// audit log: that it begins, on disk before anything is done, and how it ended,
// before the answer. A CA that is killed in between leaves the beginning. What is
// an act, the table of access says; no RPC writes its beginning by itself, so
// none can forget it.

package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/audit"
)

// act is one act under way. It belongs to the goroutine of its call.
type act struct {
	id    string // that all its records have
	name  string // "create entry"
	about audit.Record
	ended bool // its outcome is recorded
}

type actKey struct{}

func actFrom(ctx context.Context) *act {
	a, _ := ctx.Value(actKey{}).(*act)
	return a
}

// act runs do, which is what the caller of ctx asks for by method with req (nil:
// by a stream). Where the table calls that an act it is recorded: do does not run
// when its beginning cannot be. Errors are statuses.
func (s door) act(ctx context.Context, method string, req any, do func(context.Context) error) error {
	name := s.access[method].act
	if name == "" || len(callerFrom(ctx).Using) == 0 {
		return s.toStatus(ctx, do(ctx))
	}
	if err := s.hopeless(ctx, method); err != nil {
		return s.refuse(ctx, callerFrom(ctx), audit.Record{Detail: name}, s.toStatus(ctx, err))
	}
	waits, err := s.waits(ctx, method, req)
	if err != nil {
		return s.refuse(ctx, callerFrom(ctx), audit.Record{Detail: name}, s.toStatus(ctx, err))
	}
	if waits {
		do = func(ctx context.Context) error { return s.propose(ctx, method, name, req) }
		name = "propose: " + name
	}
	a := newAct(name, req)
	ctx = context.WithValue(ctx, actKey{}, a)
	if err := s.begin(ctx, a, req); err != nil {
		return s.toStatus(ctx, err)
	}
	err = do(ctx)
	if a.ended {
		return s.toStatus(ctx, err)
	}
	return s.end(ctx, a, s.toStatus(ctx, err))
}

// hopeless says why an act would fail that is not to be begun: while the disk is
// low, what is set aside in the log is for what happens, not for the beginnings of
// what a store refuses that takes no writes, as often as somebody tries.
func (s *Service) hopeless(ctx context.Context, method string) error {
	if !s.opts.Audit.Low() || method == capb.Admin_BackupStore_FullMethodName { // which writes nothing there
		return nil
	}
	_, err := s.opts.Store.Txn(ctx, nil, nil, nil) // fails as a write would
	return err
}

func newAct(name string, req any) *act {
	var id [8]byte
	rand.Read(id[:]) // never fails, see crypto/rand
	a := &act{id: hex.EncodeToString(id[:]), name: name}
	if m, ok := req.(proto.Message); ok {
		a.about = subjectOfRequest(m)
	}
	return a
}

// begin records what a is about to do; without that it is not done.
func (s *Service) begin(ctx context.Context, a *act, req any) error {
	r := a.about
	r.Detail, r.Pending = "begin to "+a.name, true
	if m, ok := req.(proto.Message); ok {
		r.Detail += describe(m)
	}
	err := s.audit(ctx, byCaller(ctx, r))
	if err == nil || errors.Is(err, audit.ErrFull) {
		return err
	}
	s.log.LogAttrs(ctx, slog.LevelError, "act refused, since its beginning cannot be recorded", slog.String("act", a.name), slog.Any("err", err))
	return status.Errorf(codes.Unavailable, "%s was not done, since the audit log takes no record of it: the CA's log and its /ready say why", a.name)
}

// end records how a ended that has not said so itself; err is a status, or nil.
func (s *Service) end(ctx context.Context, a *act, err error) error {
	r := a.about
	r.Detail = a.name
	switch {
	case err == nil:
		return s.toStatus(ctx, s.done(ctx, r))
	case !undone(status.Code(err)):
		r.Detail, r.Reason = a.name+": whether it was done is not known", status.Convert(err).Message()
		if recordErr := s.done(ctx, r); recordErr != nil {
			return s.toStatus(ctx, recordErr)
		}
		return err
	default:
		return s.refuse(ctx, callerFrom(ctx), r, err)
	}
}

// undone says whether an act that answers with this code has changed nothing. A
// transaction that was not waited for, or whose store is away, may be carried out
// all the same.
func undone(c codes.Code) bool {
	switch c {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.Internal, codes.Unknown:
		return false
	default:
		return true
	}
}

// done records the outcome of the act under way, which r tells; it is an error
// when that fails, although the act itself is done.
func (s *Service) done(ctx context.Context, r audit.Record) error {
	if a := actFrom(ctx); a != nil {
		a.ended = true
	}
	return s.did(ctx, r)
}

// part records something that was done as a part of the act under way.
func (s *Service) part(ctx context.Context, r audit.Record) error {
	a := actFrom(ctx)
	r.Pending = a != nil && !a.ended
	return s.did(ctx, r)
}

func (s *Service) did(ctx context.Context, r audit.Record) error {
	if err := s.audit(ctx, byCaller(ctx, r)); err != nil {
		return fmt.Errorf("%s was done and not recorded: %w", r.Detail, err)
	}
	return nil
}

func byCaller(ctx context.Context, r audit.Record) audit.Record {
	caller := callerFrom(ctx)
	r.Time, r.Type, r.Actor, r.Role = time.Now(), audit.Admin, caller.Name, caller.roleUsed()
	if a := actFrom(ctx); a != nil {
		r.Act = a.id
	}
	if pass := approval.From(ctx); pass != nil {
		r.ProposedBy = pass.Proposal.By.Name
	}
	return r
}

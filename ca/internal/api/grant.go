// GrantProposal: a second administrator lets a proposed act be done. Everything that
// the first call would have been asked is asked again, of both.

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/role"
	"merlon.dev/sdk/svid"
)

// GrantProposal implements capb.AdminServer.
func (s *Service) GrantProposal(ctx context.Context, req *capb.GrantProposalRequest) (*capb.GrantProposalResponse, error) {
	p, err := approval.Read(ctx, s.opts.Store, req.GetProposalId())
	if err != nil {
		return nil, err
	}
	second, err := s.mayGrant(callerFrom(ctx), p)
	if err != nil {
		return nil, err
	}
	// What the CA knows of the first one must not be older than the proposal, or than
	// what took its role away.
	revision, err := s.opts.Store.Revision(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the store's revision: %w", err)
	}
	if err := s.registry.Wait(ctx, revision); err != nil {
		return nil, err
	}
	if why := s.fallen(p, time.Now()); why != "" {
		return nil, s.endVoid(ctx, p, why)
	}
	resp, err := s.carryOut(context.WithValue(ctx, callerKey{}, second), p)
	if err != nil {
		return nil, err
	}
	packed, err := anypb.New(resp)
	if err != nil {
		return nil, fmt.Errorf("encode what %s answered: %w", p.Act, err)
	}
	return &capb.GrantProposalResponse{Proposal: proposalToProto(p), Response: packed}, nil
}

// mayGrant is c as the caller of what p proposes, if it may grant that.
func (s *Service) mayGrant(c *Caller, p *approval.Proposal) (*Caller, error) {
	person, err := personOf(c)
	if err != nil {
		return nil, err
	}
	if err := p.Grantable(person, time.Now()); err != nil {
		return nil, err
	}
	using, ok := s.mayWait(c, p.Method)
	if !ok {
		return nil, status.Errorf(codes.PermissionDenied, "%s may not grant what it may not do: %s; its role is %s", c.Name, p.Act, role.List(c.Roles))
	}
	second := *c
	second.Using = using
	return &second, nil
}

// mayWait says by which of its roles c may have the act of method done, which is one
// that can wait.
func (s *Service) mayWait(c *Caller, method string) (using []role.Role, ok bool) {
	switch s.access[method].approval {
	case capb.Approval_APPROVAL_ALWAYS, capb.Approval_APPROVAL_BY_REQUEST:
	default:
		return nil, false
	}
	using, ok = s.access.permits(method, c)
	return using, ok && slices.ContainsFunc(using, role.Role.Everywhere)
}

// fallen says why whoever proposed p could not do so any more at now.
func (s *Service) fallen(p *approval.Proposal, now time.Time) string {
	first := &Caller{Name: p.By.Name}
	switch {
	case p.By.Principal == theHost:
		first.take(role.Role{Name: role.Operator})
	case p.By.UID != nil:
		first.take(s.rolesOfUID(*p.By.UID)...)
	case p.By.SVID != nil:
		shown := p.By.SVID
		id, err := spiffeid.FromString(shown.SPIFFEID)
		if err != nil || entry.Reserved(id) {
			return shown.SPIFFEID + ", which proposed it, is no administrator"
		}
		peer := &svid.Peer{
			ID: id, Serial: shown.Serial, OurSerial: shown.OurSerial, SerialHex: shown.SerialHex, AuthorityIDs: shown.AuthorityIDs, NotBefore: shown.NotBefore,
		}
		if _, revoked := s.registry.Revoked(peer); revoked {
			return "the SVID of " + p.By.Name + ", which proposed it, was revoked"
		}
		if r := s.registry.Role(id, now); r.Name != "" {
			first.take(r)
		}
	case p.By.Token != nil && s.opts.Tokens != nil:
		first.take(s.opts.Tokens.Still(p.By.Token.Issuer, p.By.Token.Claims)...)
	}
	if _, ok := s.mayWait(first, p.Method); !ok {
		return p.By.Name + ", which proposed it, may not do it any more"
	}
	return ""
}

// requestOf is the message that p is about.
func requestOf(p *approval.Proposal) (proto.Message, error) {
	method, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(p.Method, "/"), "/", ".")))
	if err != nil {
		return nil, fmt.Errorf("read what is proposed: %w", err)
	}
	rpc, ok := method.(protoreflect.MethodDescriptor)
	if !ok {
		return nil, fmt.Errorf("read what is proposed: %s is no RPC", p.Method)
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(rpc.Input().FullName())
	if err != nil {
		return nil, fmt.Errorf("read what is proposed: %w", err)
	}
	m := kind.New().Interface()
	if err := proto.Unmarshal(p.Request, m); err != nil {
		return nil, fmt.Errorf("read what is proposed: %w", err)
	}
	return m, nil
}

// carryOut does what p proposes, by the RPC that was called for it.
func (s *Service) carryOut(ctx context.Context, p *approval.Proposal) (proto.Message, error) {
	a := actFrom(ctx)
	ctx, pass := approval.Granted(ctx, p, callerFrom(ctx).Name, a.id)
	resp, err := s.dispatch(ctx, p)
	if e, ok := errors.AsType[*approval.RefusedError](err); ok && e.Why == approval.WhyVoid {
		return nil, errors.Join(err, approval.End(ctx, s.opts.Store, p, approval.Void, callerFrom(ctx).Name, a.id, e.Reason, time.Now()))
	}
	if err != nil {
		return nil, s.overtaken(ctx, p, a, err)
	}
	if !pass.Joined() { // TestEveryActThatWaitsEndsItsProposal
		s.log.LogAttrs(ctx, slog.LevelError, "an act was granted and did not end its proposal", slog.String("act", p.Act))
		return nil, errors.Join(fmt.Errorf("%s was done and did not end its proposal", p.Act), approval.Spend(ctx, s.opts.Store, p.Basis))
	}
	return resp, nil
}

// overtaken is what kept the act a from being done: that somebody else ended p, if
// so, and otherwise err.
func (s *Service) overtaken(ctx context.Context, p *approval.Proposal, a *act, err error) error {
	latest, readErr := approval.Read(context.WithoutCancel(ctx), s.opts.Store, p.ID)
	if readErr != nil || latest.EndedIn == a.id {
		return err
	}
	if ended := latest.Waits(time.Now()); ended != nil {
		return ended
	}
	return err
}

// dispatch calls the RPC of p as its server would, past the door.
func (s *Service) dispatch(ctx context.Context, p *approval.Proposal) (proto.Message, error) {
	m, err := requestOf(p)
	if err != nil {
		return nil, err
	}
	name, own := strings.CutPrefix(p.Method, "/"+capb.Admin_ServiceDesc.ServiceName+"/")
	for _, rpc := range capb.Admin_ServiceDesc.Methods {
		if !own || rpc.MethodName != name {
			continue
		}
		resp, err := rpc.Handler(s, ctx, func(into any) error {
			proto.Merge(into.(proto.Message), m)
			return nil
		}, nil)
		if err != nil {
			return nil, err
		}
		return resp.(proto.Message), nil
	}
	return nil, status.Errorf(codes.Unimplemented, "%s is no RPC that can be proposed", p.Method)
}

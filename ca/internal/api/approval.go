// Four-eyes: which acts wait for a second administrator, and what they rest on. The
// door asks before it lets an act be done (acts.go), so no RPC can forget to; what
// an RPC adds is that its transaction takes the proposal along (approval.Join).

package api

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/role"
	"merlon.dev/ca/internal/rotation"
)

// waiting is what the annotation of an act that can wait does not say.
type waiting struct {
	// touches says of a request whether it waits; nil: each does.
	touches func(*Service, proto.Message) bool
	// basis is what it rests on, and an error where it cannot be done at all; nil:
	// nothing. What is done compares it in its transaction.
	basis func(*Service, proto.Message) (string, error)
}

// waitingActs are the acts that can wait. One that is annotated so and is not here
// waits always, and rests on nothing.
var waitingActs = map[string]waiting{
	capb.Admin_ActivateAuthority_FullMethodName: {basis: authorityBasis(rotation.Activate)},
	capb.Admin_TaintAuthority_FullMethodName:    {basis: authorityBasis(rotation.Taint)},
	capb.Admin_RevokeAuthority_FullMethodName:   {basis: authorityBasis(rotation.Revoke)},
	capb.Admin_EvictReplica_FullMethodName:      {basis: evictionBasis},
	capb.Admin_Revoke_FullMethodName:            {touches: of(revokesAuthority)},
	capb.Admin_CreateEntry_FullMethodName:       {touches: of(makesOperator)},
	capb.Admin_CreateToken_FullMethodName:       {touches: of(admitsToKeys)},
}

// of is touches for requests of one kind; any other waits.
func of[M proto.Message](touches func(*Service, M) bool) func(*Service, proto.Message) bool {
	return func(s *Service, m proto.Message) bool {
		req, ok := m.(M)
		return !ok || touches(s, req)
	}
}

func authorityBasis(verb rotation.Verb) func(*Service, proto.Message) (string, error) {
	return func(s *Service, m proto.Message) (string, error) {
		id := m.(interface{ GetAuthorityId() string }).GetAuthorityId()
		if err := s.takesStep(rotation.Command{Verb: verb, ID: id}); err != nil {
			return "", err
		}
		return s.registry.Authorities().Standing(id), nil
	}
}

func evictionBasis(s *Service, m proto.Message) (string, error) {
	rec, ok := s.registry.Replica(m.(*capb.EvictReplicaRequest).GetName())
	if !ok {
		return "", errNoReplica
	}
	return replicaBasis(rec), nil
}

// replicaBasis tells a replica from another one that joined under its name.
func replicaBasis(rec *replica.Record) string {
	return fmt.Sprintf("replica %s is there since %s", rec.Name, rec.JoinedAt.UTC().Format(time.RFC3339Nano))
}

func revokesAuthority(_ *Service, req *capb.RevokeRequest) bool {
	_, yes := req.GetSubject().(*capb.RevokeRequest_AuthorityId)
	return yes
}

// makesOperator: by such an entry one administrator could be two. An alias decides
// which nodes have what hangs below it.
func makesOperator(s *Service, req *capb.CreateEntryRequest) bool {
	e, err := entryFromProto(req.GetEntry())
	if err != nil {
		return false // it is refused
	}
	return e.Role.Name == role.Operator || e.Alias() && s.operatorsBelow(e.SPIFFEID.String())
}

// admitsToKeys: with the token of a replica or nested CA comes a key that signs for
// everybody, and with that of a node who runs there.
func admitsToKeys(s *Service, req *capb.CreateTokenRequest) bool {
	switch req.GetKind() {
	case capb.TokenKind_TOKEN_KIND_UNSPECIFIED, capb.TokenKind_TOKEN_KIND_BUNDLE_READER:
		return false
	case capb.TokenKind_TOKEN_KIND_JOIN:
		id, err := entry.AgentID(s.opts.TrustDomain, req.GetAgentName())
		return err == nil && s.operatorsBelow(id.String())
	default:
		return true
	}
}

// operatorsBelow says whether an entry under parent makes an operator.
func (s *Service) operatorsBelow(parent string) bool {
	found, _ := s.registry.Entries(registry.Filter{ParentID: parent, Only: func(e *entry.Entry) bool { return e.Role.Name == role.Operator }}, "", 1)
	return len(found) > 0
}

// waits says whether what is asked for by method waits for a second administrator.
func (s door) waits(ctx context.Context, method string, req any) (bool, error) {
	switch s.access[method].approval {
	case capb.Approval_APPROVAL_NONE:
		return false, nil
	case capb.Approval_APPROVAL_BY_REQUEST:
		m, ok := req.(proto.Message)
		if touches := waitingActs[method].touches; ok && touches != nil && !touches(s.Service, m) {
			return false, nil
		}
	}
	if s.opts.FourEyes {
		return true, nil
	}
	asks, err := approval.Required(ctx, s.opts.Store)
	return asks != "", err
}

// propose stores the act called name as a proposal in place of doing it, and answers
// so. What opened the call must hold for the whole trust domain, as the act will ask.
func (s *Service) propose(ctx context.Context, method, name string, req any) error {
	c := callerFrom(ctx)
	m, ok := req.(proto.Message)
	switch {
	case !ok:
		return status.Errorf(codes.Unimplemented, "%s waits for a second administrator, and a stream cannot", name)
	case !c.everywhere():
		return c.outside(name)
	}
	by, err := personOf(c)
	if err != nil {
		return err
	}
	basis := ""
	if look := waitingActs[method].basis; look != nil {
		if basis, err = look(s, m); err != nil {
			return err
		}
	}
	if _, whole := describeWhole(m); !whole {
		return refused(codes.InvalidArgument, capb.Refusal_REFUSAL_PROPOSAL_TOO_LONG, name+" was not proposed: it is too long for a second administrator to read")
	}
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode what is proposed: %w", err)
	}
	p, err := approval.Propose(ctx, s.opts.Store, approval.Terms{Method: method, Request: bytes, Act: name, Basis: basis, By: by}, time.Now())
	if err != nil {
		return err
	}
	about := subjectOfRequest(m)
	about.Detail, about.NotAfter = "propose: "+name+", as proposal "+p.ID, p.Until
	if err := s.done(ctx, about); err != nil {
		return err
	}
	return proposed(p)
}

// proposed is the answer to the first administrator.
func proposed(p *approval.Proposal) error {
	st := status.Newf(codes.FailedPrecondition, "%s was not done: it takes a second administrator (four_eyes), and waits as proposal %s until %s",
		p.Act, p.ID, p.Until.Format(time.RFC3339))
	info := &errdetails.ErrorInfo{Reason: reasonOf(capb.Refusal_REFUSAL_APPROVAL_REQUIRED), Domain: refusalDomain}
	if with, err := st.WithDetails(info, proposalToProto(p)); err == nil {
		st = with
	}
	return st.Err()
}

// theHost is the principal of everybody who could read the CA's keys: root and the
// CA's own user are one person, whichever of both calls.
const theHost = "the CA's host"

// personOf is c as proposals know it. Principals are names: one person with two of
// them counts as two.
func personOf(c *Caller) (approval.Person, error) {
	p := approval.Person{Principal: c.Name, Name: c.Name, Role: c.roleUsed()}
	switch {
	case c.UID != nil:
		p.UID = c.UID
		if *c.UID == 0 || *c.UID == uint32(os.Geteuid()) {
			p.Principal = theHost
		}
	case c.Peer != nil:
		p.SVID = &approval.Shown{
			SPIFFEID: c.Peer.ID.String(), Serial: c.Peer.Serial, OurSerial: c.Peer.OurSerial, SerialHex: c.Peer.SerialHex,
			AuthorityIDs: slices.Clone(c.Peer.AuthorityIDs), NotBefore: c.Peer.NotBefore,
		}
	case c.Token != nil:
		p.Token = &approval.Claimed{Issuer: c.Token.Issuer, Claims: c.Token.Matched}
	default:
		return p, status.Errorf(codes.PermissionDenied, "%s: who this is cannot be told apart from others", c.Name)
	}
	return p, nil
}

var approvalCodes = map[approval.Why]struct {
	code codes.Code
	why  capb.Refusal
}{
	approval.WhyUnknown:   {codes.NotFound, capb.Refusal_REFUSAL_PROPOSAL_UNKNOWN},
	approval.WhyExpired:   {codes.FailedPrecondition, capb.Refusal_REFUSAL_PROPOSAL_EXPIRED},
	approval.WhyDone:      {codes.FailedPrecondition, capb.Refusal_REFUSAL_PROPOSAL_DONE},
	approval.WhyWithdrawn: {codes.FailedPrecondition, capb.Refusal_REFUSAL_PROPOSAL_WITHDRAWN},
	approval.WhyOwn:       {codes.PermissionDenied, capb.Refusal_REFUSAL_PROPOSAL_OWN},
	approval.WhyVoid:      {codes.FailedPrecondition, capb.Refusal_REFUSAL_PROPOSAL_VOID},
	approval.WhyTooMany:   {codes.ResourceExhausted, capb.Refusal_REFUSAL_PROPOSALS_TOO_MANY},
}

func approvalStatus(e *approval.RefusedError) error {
	as, ok := approvalCodes[e.Why]
	if !ok {
		as.code = codes.FailedPrecondition
	}
	return refused(as.code, as.why, e.Reason)
}

func proposalToProto(p *approval.Proposal) *capb.Proposal {
	out := &capb.Proposal{
		ProposalId: p.ID, Act: p.Act, Basis: p.Basis, ProposedBy: p.By.Name, Role: p.By.Role, ProposedAt: timestamp(p.At), ExpiresAt: timestamp(p.Until),
	}
	if m, err := requestOf(p); err != nil {
		out.Request = err.Error()
	} else {
		out.Request, _ = describeWhole(m)
	}
	return out
}

// endVoid writes down that p is void, for reason, and returns the refusal.
func (s *Service) endVoid(ctx context.Context, p *approval.Proposal, reason string) error {
	in := ""
	if a := actFrom(ctx); a != nil {
		in = a.id
	}
	if err := approval.End(ctx, s.opts.Store, p, approval.Void, callerFrom(ctx).Name, in, reason, time.Now()); err != nil {
		return err
	}
	return &approval.RefusedError{Why: approval.WhyVoid, Reason: fmt.Sprintf("proposal %s (%s) is void: %s", p.ID, p.Act, reason)}
}

// ListProposals implements capb.AdminServer.
func (s *Service) ListProposals(ctx context.Context, _ *capb.ListProposalsRequest) (*capb.ListProposalsResponse, error) {
	all, err := approval.List(ctx, s.opts.Store)
	if err != nil {
		return nil, err
	}
	resp := &capb.ListProposalsResponse{}
	for _, p := range all {
		if p.Waits(time.Now()) == nil {
			resp.Proposals = append(resp.Proposals, proposalToProto(p))
		}
	}
	return resp, nil
}

// WithdrawProposal implements capb.AdminServer.
func (s *Service) WithdrawProposal(ctx context.Context, req *capb.WithdrawProposalRequest) (*capb.WithdrawProposalResponse, error) {
	now := time.Now()
	p, err := approval.Read(ctx, s.opts.Store, req.GetProposalId())
	if err == nil {
		err = p.Waits(now)
	}
	if err != nil {
		return nil, err
	}
	if err := approval.End(ctx, s.opts.Store, p, approval.Withdrawn, callerFrom(ctx).Name, actFrom(ctx).id, "", now); err != nil {
		return nil, err
	}
	if err := s.done(ctx, audit.Record{Detail: "withdraw proposal " + p.ID + " of " + p.By.Name + ": " + p.Act}); err != nil {
		return nil, err
	}
	return &capb.WithdrawProposalResponse{Proposal: proposalToProto(p)}, nil
}

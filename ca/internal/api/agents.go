// Agents as operators see them, and what operators decide about them: evicted,
// until the node attests anew, or banned, with everything that was issued through
// the agent. The decision and what it withdraws are one transaction.

package api

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// Why an agent's X509-SVID counts for nothing, beside its standing.
var (
	errRevoked = errors.New("its X509-SVID is revoked")
	errForeign = errors.New("its serial number is not one of this agent's")
)

// agentFault says why p is not the live agent of the record. What an operator
// decided comes first: it also says what to do.
func agentFault(g registry.Grounds, p *svid.Peer) error {
	switch {
	case g.Agent == nil:
		return attest.ErrUnknownAgent
	case g.Agent.Fault() != nil:
		return g.Agent.Fault()
	case g.Revoked:
		return errRevoked
	case !p.OurSerial || p.Serial.Agent != g.Agent.Handle:
		return errForeign
	}
	return nil
}

// refusalOf is err for programs.
func refusalOf(err error) capb.Refusal {
	for _, known := range []struct {
		is  error
		why capb.Refusal
	}{
		{attest.ErrBanned, capb.Refusal_REFUSAL_AGENT_BANNED},
		{attest.ErrEvicted, capb.Refusal_REFUSAL_AGENT_EVICTED},
		{errRevoked, capb.Refusal_REFUSAL_SVID_REVOKED},
		{attest.ErrUnknownAgent, capb.Refusal_REFUSAL_AGENT_UNKNOWN},
	} {
		if errors.Is(err, known.is) {
			return known.why
		}
	}
	return capb.Refusal_REFUSAL_UNSPECIFIED
}

const refusalDomain = "merlon.dev"

// reasonOf is why on the wire.
func reasonOf(why capb.Refusal) string { return strings.TrimPrefix(why.String(), "REFUSAL_") }

// refused is a status that also programs understand.
func refused(code codes.Code, why capb.Refusal, message string) error {
	st := status.New(code, message)
	if why == capb.Refusal_REFUSAL_UNSPECIFIED {
		return st.Err()
	}
	info := &errdetails.ErrorInfo{Reason: reasonOf(why), Domain: refusalDomain}
	if with, err := st.WithDetails(info); err == nil {
		st = with
	}
	return st.Err()
}

// unauthenticated refuses c for its fault.
func (c *Caller) unauthenticated() error {
	return refused(codes.Unauthenticated, c.Refusal, c.Name+": "+c.Fault)
}

// ListAgents implements capb.AdminServer.
func (s *Service) ListAgents(context.Context, *capb.ListAgentsRequest) (*capb.ListAgentsResponse, error) {
	resp, now := &capb.ListAgentsResponse{}, time.Now()
	for _, a := range s.registry.Agents() {
		resp.Agents = append(resp.Agents, agentToProto(a, now))
	}
	return resp, nil
}

// GetAgent implements capb.AdminServer.
func (s *Service) GetAgent(_ context.Context, req *capb.GetAgentRequest) (*capb.GetAgentResponse, error) {
	id, err := s.agentID(req.GetAgent())
	if err != nil {
		return nil, err
	}
	a, err := s.agentState(id)
	return &capb.GetAgentResponse{Agent: a}, err
}

// agentState is the agent as the picture has it.
func (s *Service) agentState(id spiffeid.ID) (*capb.Agent, error) {
	a, ok := s.registry.AgentState(id)
	if !ok {
		return nil, attest.ErrUnknownAgent
	}
	return agentToProto(a, time.Now()), nil
}

// agentID is the agent that a request names: by its SPIFFE ID, or by what follows
// /agent/ in that.
func (s *Service) agentID(text string) (spiffeid.ID, error) {
	if !strings.Contains(text, "://") {
		text = s.opts.TrustDomain.IDString() + "/agent/" + text
	}
	id, err := entry.ParseID("agent", text)
	if err != nil {
		return id, err
	}
	if _, ok := entry.AgentName(id); !ok || !id.MemberOf(s.opts.TrustDomain) {
		return id, &entry.InvalidError{Field: "agent", Reason: id.String() + " is no agent of the trust domain " + s.opts.TrustDomain.Name()}
	}
	return id, nil
}

// EvictAgent implements capb.AdminServer.
func (s *Service) EvictAgent(ctx context.Context, req *capb.EvictAgentRequest) (*capb.EvictAgentResponse, error) {
	a, rec, err := s.decide(ctx, "evict agent", req.GetAgent(), attest.Decision{
		From: []attest.Standing{attest.Good, attest.Evicted}, To: attest.Evicted, Note: req.GetNote(),
		Refusal: "is banned, which is more than evicted: merlon agent unban leaves it evicted",
	}, func(a *attest.Agent) svid.Revocation { return svid.Revocation{SPIFFEID: a.ID.String()} })
	if err != nil {
		return nil, err
	}
	return &capb.EvictAgentResponse{Agent: a, Revocation: revocationToProto(rec)}, nil
}

// BanAgent implements capb.AdminServer.
func (s *Service) BanAgent(ctx context.Context, req *capb.BanAgentRequest) (*capb.BanAgentResponse, error) {
	a, rec, err := s.decide(ctx, "ban agent", req.GetAgent(), attest.Decision{
		From: []attest.Standing{attest.Good, attest.Evicted, attest.Banned}, To: attest.Banned, Note: req.GetNote(),
	}, func(a *attest.Agent) svid.Revocation {
		return svid.Revocation{AgentID: a.ID.String(), AgentHandle: a.Handle}
	})
	if err != nil {
		return nil, err
	}
	return &capb.BanAgentResponse{Agent: a, Revocation: revocationToProto(rec)}, nil
}

// UnbanAgent implements capb.AdminServer. The agent is evicted then: what was
// revoked stays revoked, and its node has to attest.
func (s *Service) UnbanAgent(ctx context.Context, req *capb.UnbanAgentRequest) (*capb.UnbanAgentResponse, error) {
	a, _, err := s.decide(ctx, "unban agent", req.GetAgent(), attest.Decision{
		From: []attest.Standing{attest.Banned}, To: attest.Evicted, Note: req.GetNote(), Refusal: "is not banned",
	}, nil)
	if err != nil {
		return nil, err
	}
	return &capb.UnbanAgentResponse{Agent: a}, nil
}

// cloned evicts an agent whose identity two show. Which of them is the right one
// nobody can tell, so neither goes on: its node attests anew.
func (s *Service) cloned(ctx context.Context, caller *Caller) error {
	id, now := caller.Agent.ID, time.Now()
	about := audit.Record{Detail: "evict agent: its X509-SVID was copied", SPIFFEID: id.String(), Serial: caller.Peer.SerialHex}
	r := svid.Revocation{SPIFFEID: id.String(), ExpiresAt: now.Add(recordLife), Note: "agent evicted: its X509-SVID was copied"}
	_, err := attest.Decide(ctx, s.opts.Store, id, attest.Decision{
		From: []attest.Standing{attest.Good}, To: attest.Evicted, Now: now, Note: attest.ErrCloned.Error(),
		With: func(*attest.Agent) (store.Op, error) { put, _, err := revocation.Put(s.opts.Realm, r); return put, err },
	})
	if _, decided := errors.AsType[*attest.StandingError](err); err != nil && !decided {
		return err
	}
	s.metrics.cloned.Inc()
	s.log.LogAttrs(ctx, slog.LevelError, "an agent is evicted: two show its identity, one of them with an X509-SVID that was replaced before",
		slog.String("spiffe_id", caller.Name), slog.String("serial", caller.Peer.SerialHex),
		slog.String("hint", "find out who copied the agent's data_dir, then let the right node attest anew; or ban it: merlon agent ban"))
	return s.refuse(ctx, caller, about, refused(codes.Unauthenticated, capb.Refusal_REFUSAL_AGENT_EVICTED, caller.Name+": "+attest.ErrCloned.Error()))
}

// decide carries d out for the named agent, with the revocation of what it takes
// away, and records it as what.
func (s *Service) decide(ctx context.Context, what, name string, d attest.Decision, withdraws func(*attest.Agent) svid.Revocation) (*capb.Agent, *revocation.Record, error) {
	id, err := s.agentID(name)
	if err != nil {
		return nil, nil, err
	}
	if err := checkNote(d.Note); err != nil {
		return nil, nil, err
	}
	d.Now = time.Now()
	var made svid.Revocation
	var key string
	if withdraws != nil {
		d.With = func(a *attest.Agent) (put store.Op, err error) {
			made = withdraws(a)
			made.ExpiresAt, made.Note = d.Now.Add(recordLife), fitNote(strings.TrimSuffix(what+": "+d.Note, ": "))
			put, key, err = revocation.Put(s.opts.Realm, made)
			return put, err
		}
	}
	decided, err := attest.Decide(ctx, s.opts.Store, id, d)
	if err != nil {
		return nil, nil, err
	}
	if err := s.done(ctx, audit.Record{Detail: what, SPIFFEID: id.String(), Reason: d.Note}); err != nil {
		return nil, nil, err
	}
	if err := s.registry.Wait(ctx, decided.Revision); err != nil {
		return nil, nil, err
	}
	a, err := s.agentState(id)
	return a, s.revocationAt(made, key, decided.Revision), err
}

// The states of an agent that are not a standing.
const (
	stateAttested = "attested"
	stateExpired  = "expired"
)

func agentToProto(a registry.AgentState, now time.Time) *capb.Agent {
	p := &capb.Agent{
		SpiffeId: a.ID.String(), Attestation: a.Attestation,
		AttestedAt: timestamp(a.AttestedAt), NotAfter: timestamp(a.NotAfter), Connected: a.Connected,
		State: stateAttested, Selectors: selectorsToProto(a.Selectors),
	}
	switch {
	case a.Standing != attest.Good:
		p.State, p.StateSince, p.StateNote = string(a.Standing), timestamp(a.StandingSince), a.StandingNote
	case !now.Before(a.NotAfter):
		p.State = stateExpired
	}
	if a.Acked {
		p.Ack = &capb.SyncAck{
			Revision: a.Ack.Revision, TrustBundleSequence: a.Ack.TrustBundleSequence, PolicyGeneration: a.Ack.PolicyGeneration,
		}
	}
	return p
}

// What operators ask on the admin socket: how the agent is, and why a process has no
// identity.

package local

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/workload"
)

// maxMisses is how many entries that do not match are told about.
const maxMisses = 20

// ExplainIdentity says what a process proves, which entries it matches, and
// which it misses by how much.
func (s *Server) ExplainIdentity(ctx context.Context, req *agentpb.ExplainIdentityRequest) (*agentpb.ExplainIdentityResponse, error) {
	p, err := s.o.Callers.Attestor.AttestPID(ctx, req.GetPid())
	if errors.Is(err, workload.ErrGone) {
		return nil, status.Errorf(codes.NotFound, "no process %d runs in the agent's PID namespace", req.GetPid())
	}
	if err != nil {
		return nil, status.Errorf(codes.Internal, "look at process %d: %v", req.GetPid(), err)
	}
	state := s.cache.State()
	matches, misses := s.cache.Nearest(p.Selectors(), maxMisses)
	m := &agentpb.ExplainIdentityResponse{
		Synced: state.Synced, Connected: state.Connected, Stale: state.Stale, EntryCount: int32(state.Entries),
		Selectors: p.Selectors(), Notes: p.Notes,
	}
	if !state.Heard.IsZero() {
		m.HeardAt = timestamppb.New(state.Heard)
	}
	if id := s.o.AgentID(); !id.IsZero() {
		m.AgentId = id.String()
	}
	for _, e := range matches {
		m.Entries = append(m.Entries, &agentpb.EntryMatch{
			EntryId: e.ID, SpiffeId: e.SPIFFEID.String(), Matches: true,
			FederatesWith: e.FederatesWith, FederationWaiting: s.cache.FederationWaiting(e),
		})
	}
	for _, miss := range misses {
		m.Entries = append(m.Entries, &agentpb.EntryMatch{
			EntryId: miss.Entry.ID, SpiffeId: miss.Entry.SPIFFEID.String(), Missing: miss.Missing,
		})
	}
	m.Reason, m.Hint = whyNone(state, matches, misses, p, m.GetAgentId())
	if m.GetReason() == "" {
		m.Reason, m.Hint = whyNoSVID(matches, s.cache.Outlook().Waiting)
	}
	return m, nil
}

// whyNone names the reason for which a process has no identity, the same as the
// Workload API gives, and what to do; both empty if it has one.
func whyNone(state cache.State, matches []*cache.Entry, misses []cache.Miss, p *workload.Process, agentID string) (reason, hint string) {
	switch {
	case !state.Synced: // half a picture gives nobody an identity
		return endpoint.NotSynced, "the agent has not heard everything from the CA yet: see the agent's log and its /ready"
	case len(matches) > 0:
		return "", ""
	case !state.Connected, state.Stale:
		return endpoint.NotSynced, "no changes arrive from the CA, so there may be an entry that the agent does not know: see the agent's log and its /ready"
	case p.Read != workload.AllKinds:
		return endpoint.Incomplete, p.Notes[len(p.Notes)-1]
	case len(misses) == 0:
		return endpoint.NoMatchingEntry, fmt.Sprintf("this node has no entries: merlon entry create --parent %s --selector unix:uid:%d --spiffe-id ID", agentID, p.UID)
	}
	hint = fmt.Sprintf("the nearest entry is %s for %s, which also needs %q: merlon entry show %[1]s",
		misses[0].Entry.ID, misses[0].Entry.SPIFFEID, misses[0].Missing)
	if len(p.Notes) > 0 {
		hint += "; what could not be proved: " + strings.Join(p.Notes, "; ")
	}
	return endpoint.NoMatchingEntry, hint
}

// whyNoSVID names the reason for which a process that matches entries gets no
// X509-SVID from the Workload API; waiting are the IDs of the entries whose SVIDs
// are waited for. Both are empty where it has one, or has not asked.
func whyNoSVID(matches []*cache.Entry, waiting []string) (reason, hint string) {
	handedOut := slices.DeleteFunc(slices.Clone(matches), func(e *cache.Entry) bool { return !e.AgentKey })
	switch {
	case len(handedOut) == 0:
		return endpoint.ByWorkload, "its registration entries let no key be handed out: the process has X509-SVIDs by sdk.Open (merlon.agent.v1.Local/HoldKeys), and trust bundles and JWT-SVIDs by the Workload API"
	case slices.ContainsFunc(handedOut, func(e *cache.Entry) bool { return !slices.Contains(waiting, e.ID) }):
		return "", ""
	}
	return endpoint.CAUnavailable, fmt.Sprintf("the CA has not issued the X509-SVID of entry %s: see the agent's log, and merlon doctor", handedOut[0].ID)
}

// Status says how the agent is.
func (s *Server) Status(ctx context.Context, _ *agentpb.StatusRequest) (*agentpb.StatusResponse, error) {
	return s.o.Status(ctx), nil
}

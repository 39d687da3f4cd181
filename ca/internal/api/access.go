// Who may call what: a table made at start from the annotations in the protos.
// What the table does not list is denied to everyone, so an RPC that somebody
// adds without thinking of its callers does no harm.

package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/unixsock"
)

// access maps a full method name ("/merlon.ca.v1.Node/Sign") to the kinds of
// caller that may call it. It is not changed once a server runs.
type access map[string][]capb.Caller

// accessOf reads the annotations of every service in files.
func accessOf(files ...protoreflect.FileDescriptor) access {
	table := make(access)
	for _, file := range files {
		services := file.Services()
		for i := range services.Len() {
			methods := services.Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				if a, ok := proto.GetExtension(m.Options(), capb.E_Access).(*capb.Access); ok {
					table[fmt.Sprintf("/%s/%s", services.Get(i).FullName(), m.Name())] = a.GetCallers()
				}
			}
		}
	}
	return table
}

// permits says whether a caller of the given kinds may call method.
func (t access) permits(method string, kinds []capb.Caller) bool {
	return slices.ContainsFunc(t[method], func(want capb.Caller) bool {
		return want != capb.Caller_CALLER_UNSPECIFIED && slices.Contains(kinds, want)
	})
}

// Caller is who makes a call, resolved anew for every call: a connection
// outlives what it was admitted for.
type Caller struct {
	// Name is for audit and errors: a SPIFFE ID, "uid:0" or "anonymous".
	Name string
	// Kinds always holds CALLER_ANONYMOUS.
	Kinds []capb.Caller
	// Agent and Peer are set for agents, Replica and Peer for replicas; Peer for
	// whoever showed an SVID.
	Agent   *attest.Agent
	Replica *replica.Record
	Peer    *svid.Peer
	// Fault says why the SVID that was shown counts for nothing.
	Fault string
	// Behind: the SVID is newer than what this replica knows, so that another
	// one may know better.
	Behind bool
}

// Is says whether the caller is of the given kind.
func (c *Caller) Is(kind capb.Caller) bool { return slices.Contains(c.Kinds, kind) }

// callerOf resolves who makes the call of ctx.
func (s *Service) callerOf(ctx context.Context) *Caller {
	c := Anonymous()
	p, ok := peer.FromContext(ctx)
	if !ok {
		return c
	}
	switch info := p.AuthInfo.(type) {
	case unixsock.AuthInfo:
		c.Name = fmt.Sprintf("uid:%d", info.Peer.UID)
		if s.mayAdminister(info.Peer.UID) {
			c.Kinds = append(c.Kinds, capb.Caller_CALLER_ADMIN)
		}
	case tlsInfo:
		if info.Peer != nil {
			s.resolvePeer(ctx, c, info.Peer)
		}
	}
	return c
}

// PeerCaller resolves the owner of a verified SVID.
func (s *Service) PeerCaller(p *svid.Peer) *Caller {
	c := Anonymous()
	s.resolvePeer(context.Background(), c, p)
	return c
}

// resolvePeer fills c with what the SVID of p is worth now. An ID alone makes
// nobody an agent, administrator or replica: the CA's own records must agree
// (SECURITY.md T8).
func (s *Service) resolvePeer(ctx context.Context, c *Caller, p *svid.Peer) {
	c.Name, c.Peer, c.Behind = p.ID.String(), p, !s.catchUp(ctx, p)
	now := time.Now()
	if !now.Before(p.NotAfter) {
		c.Fault = "its X509-SVID has expired"
		return
	}
	g := s.registry.Grounds(p)
	if g.Revoked {
		c.Fault = "its X509-SVID is revoked"
		return
	}
	if _, isAgent := entry.AgentName(p.ID); isAgent {
		if err := agentFault(g.Agent, p); err != nil {
			c.Fault = err.Error()
			return
		}
		c.Agent = g.Agent
		c.Kinds = append(c.Kinds, capb.Caller_CALLER_AGENT)
		return
	}
	if p.ID == entry.CAID(s.opts.TrustDomain) {
		if rec, ok := s.registry.ReplicaOf(issuerOf(p)); ok {
			c.Replica = rec
			c.Kinds = append(c.Kinds, capb.Caller_CALLER_REPLICA)
		} else {
			c.Fault = "its authority is not that of a replica"
		}
		return
	}
	if !entry.Reserved(p.ID) && s.registry.Admin(p.ID, now) {
		c.Kinds = append(c.Kinds, capb.Caller_CALLER_ADMIN)
	}
}

// catchUpWait is how long a call waits for the picture to reach the revision
// that the caller's SVID was issued from, at another replica.
const catchUpWait = 2 * time.Second

// catchUp says whether the picture is at least as new as the SVID of p, which
// its serial number tells under the signature of an authority; it waits for
// that, unless the store cannot be reached.
func (s *Service) catchUp(ctx context.Context, p *svid.Peer) bool {
	if !p.OurSerial || !p.ID.MemberOf(s.opts.TrustDomain) || p.Serial.Revision <= s.registry.Revision() {
		return true
	}
	if s.Stale() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpWait)
	defer cancel()
	return s.registry.Wait(ctx, p.Serial.Revision) == nil
}

// issuerOf is the authority ID of the intermediate that signed the SVID of p.
func issuerOf(p *svid.Peer) string {
	if len(p.AuthorityIDs) < 2 { // the root is no replica
		return ""
	}
	return p.AuthorityIDs[0]
}

// agentFault says why p is not the live agent of the record.
func agentFault(record *attest.Agent, p *svid.Peer) error {
	switch {
	case record == nil:
		return attest.ErrUnknownAgent
	case !p.OurSerial || p.Serial.Agent != record.Handle:
		return errors.New("its serial number is not one of this agent's")
	}
	return nil
}

// mayAdminister: root, the CA's own user, and whom the configuration names.
func (s *Service) mayAdminister(uid uint32) bool {
	return uid == 0 || uid == uint32(os.Geteuid()) || slices.Contains(s.opts.AdminUIDs, uid)
}

// authorize says whether c may call method, as a status error.
func (t access) authorize(c *Caller, method string) error {
	if t.permits(method, c.Kinds) {
		return nil
	}
	if c.Behind {
		return status.Errorf(codes.Unavailable, "%s: its X509-SVID is newer than what this replica knows; another one may know it", c.Name)
	}
	if c.Fault != "" {
		return status.Errorf(codes.Unauthenticated, "%s: %s", c.Name, c.Fault)
	}
	kinds := t[method]
	if len(kinds) == 0 {
		return status.Errorf(codes.PermissionDenied, "%s is open to nobody", method)
	}
	names := make([]string, len(kinds))
	for i, k := range kinds {
		names[i] = strings.ToLower(strings.TrimPrefix(k.String(), "CALLER_"))
	}
	return status.Errorf(codes.PermissionDenied, "%s may not call %s, which is for: %s", c.Name, method, strings.Join(names, ", "))
}

type callerKey struct{}

// callerFrom returns whom the interceptor let in.
func callerFrom(ctx context.Context) *Caller {
	c, ok := ctx.Value(callerKey{}).(*Caller)
	if !ok {
		panic("api: an RPC ran without the access interceptor")
	}
	return c
}

// Anonymous is a caller who showed nothing.
func Anonymous() *Caller {
	return &Caller{Name: "anonymous", Kinds: []capb.Caller{capb.Caller_CALLER_ANONYMOUS}}
}

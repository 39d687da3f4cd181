// Who may call what: a table made at start from the annotations in the protos.
// What the table does not list is denied to everyone, so an RPC that somebody
// adds without thinking of its callers does no harm.

package api

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/oidc"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/role"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/unixsock"
)

// access maps a full method name ("/merlon.ca.v1.Node/Sign") to whom it is for.
// It is not changed once a server runs.
type access map[string]rule

// rule says whom one RPC is for. The zero value is for nobody.
type rule struct {
	callers []capb.Caller
	// roles are those of which an administrator needs one; without any, no
	// administrator may call it.
	roles []role.Name
	// reads: it changes nothing. act is what an administrator does by it, approval
	// whether that takes two. With neither no administrator may call it, nor where
	// approval does not say.
	reads    bool
	act      string
	approval capb.Approval
}

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
					table[fmt.Sprintf("/%s/%s", services.Get(i).FullName(), m.Name())] = rule{a.GetCallers(), roleNames(a.GetRoles()), a.GetReads(), a.GetAct(), a.GetApproval()}
				}
			}
		}
	}
	return table
}

func roleNames(roles []capb.Role) []role.Name {
	var names []role.Name
	for _, r := range roles {
		if r != capb.Role_ROLE_UNSPECIFIED {
			names = append(names, roleName(r))
		}
	}
	return names
}

// saysWhat says whether it is known what an administrator does by the RPC.
func (r rule) saysWhat() bool {
	return r.reads || r.act != "" && r.approval != capb.Approval_APPROVAL_UNSPECIFIED
}

// whom names for people whom the RPC is for: "agent", "viewer or operator".
func (r rule) whom() string {
	var kinds []string
	for _, k := range r.callers {
		if k != capb.Caller_CALLER_ADMIN {
			kinds = append(kinds, strings.ToLower(strings.TrimPrefix(k.String(), "CALLER_")))
			continue
		}
		var names []string
		for _, n := range r.roles {
			names = append(names, string(n))
		}
		if len(names) > 0 && r.saysWhat() {
			kinds = append(kinds, strings.Join(names, " or "))
		}
	}
	return strings.Join(kinds, ", ")
}

// permits says whether c may call method, and by which of its roles: none where
// it may as another kind of caller.
func (t access) permits(method string, c *Caller) (using []role.Role, ok bool) {
	rule := t[method]
	for _, kind := range rule.callers {
		switch {
		case kind == capb.Caller_CALLER_UNSPECIFIED || !c.Is(kind):
		case kind != capb.Caller_CALLER_ADMIN:
			ok = true
		default:
			for _, r := range c.Roles {
				if rule.saysWhat() && slices.Contains(rule.roles, r.Name) {
					using, ok = append(using, r), true
				}
			}
		}
	}
	return using, ok
}

// Caller is who makes a call, resolved anew for every call: a connection
// outlives what it was admitted for.
type Caller struct {
	// Name is for audit and errors: a SPIFFE ID, "uid:0", "anonymous", or issuer
	// and subject of a token, "https://login.example.org#ann".
	Name string
	// Kinds always holds CALLER_ANONYMOUS, and CALLER_ADMIN where there are Roles.
	Kinds []capb.Caller
	// Roles are what an administrator holds, and Using those that opened this
	// call to it.
	Roles, Using []role.Role
	// Agent and Peer are set for agents, Replica and Peer for replicas and nested
	// CAs; Peer for whoever showed an SVID.
	Agent   *attest.Agent
	Replica *replica.Record
	Peer    *svid.Peer
	// UID is that of a user on the admin socket.
	UID *uint32
	// Token is whose token was shown; Expiry is when it ends, zero: none was.
	Token  *oidc.Identity
	Expiry time.Time
	// Fault says why what was shown counts for nothing, and Refusal to programs.
	Fault   string
	Refusal capb.Refusal
	// Withdrawn: what was shown is a CA's, which was evicted.
	Withdrawn bool
	// Unsure says why it cannot be judged now, or not by this replica.
	Unsure string
}

// Is says whether the caller is of the given kind.
func (c *Caller) Is(kind capb.Caller) bool { return slices.Contains(c.Kinds, kind) }

// take makes c an administrator in the given roles.
func (c *Caller) take(roles ...role.Role) {
	if len(roles) > 0 && !c.Is(capb.Caller_CALLER_ADMIN) {
		c.Kinds = append(c.Kinds, capb.Caller_CALLER_ADMIN)
	}
	c.Roles = append(c.Roles, roles...)
}

// roleUsed is for audit: by which roles the call was let in, or else those that
// it was not let in by.
func (c *Caller) roleUsed() string {
	roles := c.Using
	if len(roles) == 0 {
		roles = c.Roles
	}
	if len(roles) == 0 {
		return ""
	}
	return role.List(roles)
}

// callerOf resolves who makes the call of ctx.
func (s *Service) callerOf(ctx context.Context) *Caller {
	c := Anonymous()
	p, ok := peer.FromContext(ctx)
	if !ok {
		return c
	}
	md, _ := metadata.FromIncomingContext(ctx)
	token, shown := bearer(md)
	switch info := p.AuthInfo.(type) {
	case unixsock.AuthInfo:
		if shown {
			return TwoCredentials()
		}
		c.Name, c.UID = fmt.Sprintf("uid:%d", info.Peer.UID), &info.Peer.UID
		c.take(s.rolesOfUID(info.Peer.UID)...)
	case tlsInfo:
		switch {
		case info.Peer != nil && shown, shown && token == "":
			return TwoCredentials()
		case info.Peer != nil:
			s.resolvePeer(ctx, c, info.Peer)
		case shown:
			return s.TokenCaller(ctx, token)
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
	c.Name, c.Peer = p.ID.String(), p
	if !s.catchUp(ctx, p) {
		c.Unsure = "its X509-SVID is newer than what this replica knows; another one may know it"
	}
	now := time.Now()
	if !now.Before(p.NotAfter) {
		c.Fault = "its X509-SVID has expired"
		return
	}
	g := s.registry.Grounds(p)
	if _, isAgent := entry.AgentName(p.ID); isAgent {
		if err := agentFault(g, p); err != nil {
			c.Fault, c.Refusal = err.Error(), refusalOf(err)
			return
		}
		c.Agent = g.Agent
		c.Kinds = append(c.Kinds, capb.Caller_CALLER_AGENT)
		return
	}
	if g.Revoked {
		c.Fault = errRevoked.Error()
		c.Withdrawn = p.ID == entry.CAID(s.opts.TrustDomain) && g.Revocation.AuthorityID != "" && g.Revocation.BeforeRevision == 0
		return
	}
	if p.ID == entry.CAID(s.opts.TrustDomain) {
		if rec, ok := s.registry.ReplicaOf(issuerOf(p)); ok {
			c.Replica = rec
			kind := capb.Caller_CALLER_REPLICA
			if rec.Realm != s.opts.Realm {
				kind = capb.Caller_CALLER_NESTED_CA
			}
			c.Kinds = append(c.Kinds, kind)
		} else {
			c.Fault = "its authority is not that of a replica"
		}
		return
	}
	if r := s.registry.Role(p.ID, now); r.Name != "" && !entry.Reserved(p.ID) {
		c.take(r)
	}
}

// catchUpWait is how long a call waits for the picture to reach the revision
// that the caller's SVID was issued from, at another replica.
const catchUpWait = 2 * time.Second

// catchUp says whether the picture is at least as new as the SVID of p, which
// its serial number tells under the signature of an authority; it waits for
// that, unless the store cannot be reached.
func (s *Service) catchUp(ctx context.Context, p *svid.Peer) bool {
	if !p.OurSerial || p.Serial.Realm != s.opts.Realm || !p.ID.MemberOf(s.opts.TrustDomain) || p.Serial.Revision <= s.registry.Revision() {
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

// rolesOfUID are the roles of a user on the admin socket. Root and the CA's own
// user are operators whatever is configured: they could read its keys anyway,
// and somebody must be able to set right what was configured wrong.
func (s *Service) rolesOfUID(uid uint32) []role.Role {
	if uid == 0 || uid == uint32(os.Geteuid()) {
		return []role.Role{{Name: role.Operator}}
	}
	if r, ok := s.opts.UIDs[uid]; ok {
		return []role.Role{r}
	}
	return nil
}

// authorize says whether c may call method, as a status error, and remembers by
// which roles.
func (t access) authorize(c *Caller, method string) error {
	using, ok := t.permits(method, c)
	if c.Using = using; ok {
		return nil
	}
	if c.Unsure != "" {
		return status.Errorf(codes.Unavailable, "%s: %s", c.Name, c.Unsure)
	}
	if c.Withdrawn {
		return refused(codes.PermissionDenied, capb.Refusal_REFUSAL_CA_EVICTED, c.Name+": its authority was withdrawn for good: this CA was evicted")
	}
	if c.Fault != "" {
		return c.unauthenticated()
	}
	whom := t[method].whom()
	if whom == "" {
		return status.Errorf(codes.PermissionDenied, "%s is open to nobody", method)
	}
	has := ""
	if len(c.Roles) > 0 {
		has = "; its role is " + role.List(c.Roles)
	}
	return status.Errorf(codes.PermissionDenied, "%s may not call %s, which is for: %s%s", c.Name, method, whom, has)
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

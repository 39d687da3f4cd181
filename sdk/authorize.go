// Decisions: each call is decided by the policy that the agent compiled for this
// service, or put to the agent. What cannot be decided is denied with a reason.

package sdk

import (
	"cmp"
	"context"
	"crypto/tls"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/sdk/svid"
)

// authorizeTimeout bounds a decision; an agent that takes longer is as good as
// away.
const authorizeTimeout = 2 * time.Second

// Authorize says whether a call may happen. It implements policy.Authorizer.
// in.Source must come from a verified peer; in.Destination may be empty and then
// is the own SPIFFE ID. It decides at once where the policy is compiled for this
// service; else it asks the agent, for at most 2 s, unless it has answered a call that the policy cannot
// tell from this one.
//
// Servers use httpauth or grpcauth, which fill the input from the connection
// by [Identity.Decide].
func (id *Identity) Authorize(ctx context.Context, in *policy.Input) policy.Decision {
	if in == nil {
		return policy.Deny(policy.BadRequest)
	}
	d := id.enforce(ctx, in, id.authorize(ctx, in, time.Now(), false))
	id.tell(ctx, in, d)
	return d
}

func (id *Identity) logDenied(ctx context.Context, in *policy.Input, d policy.Decision, err error) {
	attrs := []slog.Attr{
		slog.String("reason", string(d.Reason)),
		slog.String("decision_id", d.DecisionID.String()),
		slog.String("source", in.Source),
		slog.String("protocol", string(in.Protocol)),
		slog.String("method", in.Method),
		slog.String("path", in.Path),
		slog.String("hint", d.Hint()),
	}
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	id.denials.log(ctx, id.log, "call denied", attrs...)
}

// authorize has the policy decide. looked: it is known that the caller's SVID is not
// withdrawn; else what was answered before may not count.
func (id *Identity) authorize(ctx context.Context, in *policy.Input, now time.Time, looked bool) policy.Decision {
	if in.Source == "" {
		return id.refused(in, policy.NoIdentity)
	}
	if !transportable(in) {
		return id.refused(in, policy.BadRequest)
	}
	if own := id.current.Load(); in.Destination == "" && own.svid != nil {
		named := *in
		named.Destination = own.svid.ID.String()
		in = &named
	}
	if p := id.program(in.Destination, now); p != nil {
		return id.decideHere(p, in, now)
	}
	if a := id.answers(in.Destination, now); a != nil && (looked || !id.concerns(in)) {
		return id.decideKept(ctx, a, in, now)
	}
	return id.askAgent(ctx, in)
}

// askAgent has the agent decide.
func (id *Identity) askAgent(ctx context.Context, in *policy.Input) policy.Decision {
	bounded, cancel := context.WithTimeout(ctx, authorizeTimeout)
	defer cancel()
	req := authorizeRequest(in, id.current.Load())
	req.AuditMode = time.Now().Before(id.audit.until)
	res, err := id.agent.local.Authorize(bounded, req)
	if err != nil {
		if ctx.Err() == nil { // else the caller has gone, and the agent may be fine
			id.decisions.trouble(ctx, id.log, "decisions not available", err)
		}
		switch status.Code(err) {
		case codes.InvalidArgument:
			return id.refused(in, policy.BadRequest)
		case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unimplemented, codes.ResourceExhausted:
			return id.refused(in, policy.AgentUnavailable)
		}
		return id.refused(in, policy.Error)
	}
	id.decisions.fine(ctx, id.log, "decisions available again")
	return decisionOf(res.GetDecision())
}

// decisionOf trusts nothing that is missing: an allowing answer is one that
// says so in both of its fields.
func decisionOf(pb *agentpb.Decision) policy.Decision {
	d := policy.Decision{
		Allow:    pb.GetAllow() && policy.Reason(pb.GetReason()) == policy.Allowed,
		Reason:   policy.Reason(pb.GetReason()),
		RuleID:   pb.GetRuleId(),
		Revision: pb.GetPolicyGeneration(),
		DryRun:   pb.GetDryRun(),
	}
	var err error
	if d.DecisionID, err = policy.ParseDecisionID(pb.GetDecisionId()); err != nil {
		d.DecisionID = policy.NewDecisionID()
	}
	if d.Response, err = responseOf(pb.GetResponse()); err != nil {
		d.Allow, d.Reason = false, policy.Error
	}
	if !d.Allow && (d.Reason == "" || d.Reason == policy.Allowed) {
		d.Reason = policy.Error
	}
	return d
}

func responseOf(pb *agentpb.Response) (*policy.Response, error) {
	if pb == nil {
		return nil, nil
	}
	r := &policy.Response{
		Status: int(pb.GetStatus()), Body: pb.GetBody(), Headers: fieldsOf(pb.GetHeaders()),
		ResponseHeaders: fieldsOf(pb.GetResponseHeaders()), RemoveHeaders: pb.GetRemoveHeaders(),
	}
	if err := r.Check(); err != nil {
		return nil, err
	}
	return r, nil
}

func fieldsOf(pb []*agentpb.HeaderField) (fields []policy.HeaderField) {
	for _, f := range pb {
		fields = append(fields, policy.HeaderField{Name: f.GetName(), Value: f.GetValue()})
	}
	return fields
}

func authorizeRequest(in *policy.Input, own *current) *agentpb.AuthorizeRequest {
	req := &agentpb.AuthorizeRequest{
		Destination:        in.Destination,
		Source:             in.Source,
		Protocol:           string(in.Protocol),
		Method:             in.Method,
		Path:               in.Path,
		Query:              in.Query,
		Host:               in.Host,
		SourceAddress:      in.SourceAddress,
		DestinationAddress: in.DestinationAddress,
		SourceSerial:       in.SourceSerial,
	}
	if req.Destination == "" && own.svid != nil {
		req.Destination = own.svid.ID.String()
	}
	if headers := in.HeaderMap(); len(headers) > 0 {
		req.Headers = make(map[string]*agentpb.HeaderValues, len(headers))
		for name, values := range headers {
			req.Headers[name] = &agentpb.HeaderValues{Values: values}
		}
	}
	return req
}

// transportable says whether every string is UTF-8. Others cannot be put to the
// agent as they are, and what a policy decides must not depend on who runs it.
func transportable(in *policy.Input) bool {
	for _, s := range [...]string{in.Destination, in.Source, in.Method, in.Path, in.Query, in.Host} {
		if !utf8.ValidString(s) {
			return false
		}
	}
	return in.Headers == nil || in.Headers.UTF8()
}

// Decide decides one call that has arrived on the connection with TLS state
// cs: the peer has to be one that this identity let in, whose connection has
// not been cut, whose X509-SVID has neither expired nor been revoked since,
// and then the policy is asked. cs is nil for a call that came without TLS; it is
// denied but where [WithPlaintextUntil] says otherwise. Decide fills in.Source, in.Destination and
// in.SourceSerial from the connection, whatever they held, and the addresses where
// they are empty. The context that it returns has the peer and the decision.
//
// [Identity.Begin] also watches over the call, and [Identity.Ask] makes no context;
// both cost less.
func (id *Identity) Decide(ctx context.Context, cs *tls.ConnectionState, in *policy.Input) (context.Context, policy.Decision) {
	var call callInfo
	call.peer, call.decision = id.Ask(ctx, cs, in)
	return context.WithValue(ctx, callKey{}, &call), call.decision
}

// decideOn decides a call that came on conn, which is that of cs, or nil for none.
func (id *Identity) decideOn(ctx context.Context, cs *tls.ConnectionState, conn *liveConn, in *policy.Input) (peer *svid.Peer, d policy.Decision) {
	if conn != nil {
		peer = conn.peer
	}
	if cs == nil && in != nil && id.audit.letsPlaintext(time.Now()) && !id.closed.Load() {
		d = id.decidePlaintext(ctx, in)
	} else {
		d = id.decide(ctx, conn, in)
	}
	id.tell(ctx, in, d)
	return peer, d
}

func (id *Identity) decide(ctx context.Context, conn *liveConn, in *policy.Input) policy.Decision {
	if in == nil {
		return policy.Deny(policy.BadRequest)
	}
	id.fill(in, conn)
	now := time.Now()
	reason, err := policy.Allowed, error(nil)
	switch {
	case conn == nil:
		reason = policy.NoIdentity
	case !now.Before(conn.peer.NotAfter):
		reason = policy.Expired
	case id.isRevoked(conn):
		reason = policy.Revoked
	case in.Protocol != policy.TCP:
		// Enforcement points have checked it; one that forgets fails here.
		if err = policy.CheckPath(in.Path); err != nil {
			reason = policy.BadRequest
		}
	}
	if reason == policy.Allowed {
		return id.enforce(ctx, in, id.authorize(ctx, in, now, true))
	}
	d := id.refused(in, reason)
	id.logDenied(ctx, in, d, err)
	return d
}

// decidePlaintext decides a call of a caller that nobody knows.
func (id *Identity) decidePlaintext(ctx context.Context, in *policy.Input) policy.Decision {
	id.fill(in, nil)
	if in.Protocol != policy.TCP {
		if err := policy.CheckPath(in.Path); err != nil {
			d := id.refused(in, policy.BadRequest)
			id.logDenied(ctx, in, d, err)
			return d
		}
	}
	id.audit.sawPlaintext(in.SourceAddress, true, time.Now())
	d := policy.Deny(policy.NoIdentity)
	d.LetThrough = true
	id.note(in, &d, time.Now())
	return id.letThrough(ctx, in, d)
}

// DecidesHere says whether the policy of calls to this process is compiled, so that
// Decide does not wait for the agent. It is for enforcement points that must not
// block; the next call of Decide can still be another matter.
func (id *Identity) DecidesHere() bool {
	own := id.current.Load().svid
	return own == nil || id.program(own.ID.String(), time.Now()) != nil
}

// fill takes both ends of the call from the connection; nil for none.
func (id *Identity) fill(in *policy.Input, conn *liveConn) {
	in.Source, in.Destination, in.SourceSerial = "", "", ""
	if conn != nil {
		in.Source, in.SourceSerial = conn.peer.ID.String(), conn.peer.SerialHex
		in.SourceAddress, in.DestinationAddress = cmp.Or(in.SourceAddress, conn.remote), cmp.Or(in.DestinationAddress, conn.local)
	}
	if own := id.current.Load(); own.svid != nil {
		in.Destination = own.svid.ID.String()
	}
}

// isRevoked says whether the peer's X509-SVID is withdrawn now. A set that has been looked
// at for this connection is not looked at again.
func (id *Identity) isRevoked(conn *liveConn) bool {
	set := id.revocations.Load()
	if conn.cleared.Load() == set {
		return false
	}
	_, revoked := set.Concerning(conn.peer)
	if !revoked {
		conn.cleared.Store(set)
	}
	return revoked
}

// concerns says whether a revocation may be about the caller, of which no connection is
// known here: one without a readable serial number is concerned by all that name it.
func (id *Identity) concerns(in *policy.Input) bool {
	set := id.revocations.Load()
	if set.Len() == 0 {
		return false
	}
	caller, err := spiffeid.FromString(in.Source)
	if err != nil {
		return true
	}
	_, concerned := set.Concerning(svid.PeerBySerial(caller, in.SourceSerial))
	return concerned
}

// Refuse is the denial, for BAD_REQUEST, of a call that is too malformed to be
// put to a policy. why is logged.
func (id *Identity) Refuse(ctx context.Context, cs *tls.ConnectionState, in *policy.Input, why error) policy.Decision {
	conn, _ := id.conns.find(cs)
	id.fill(in, conn)
	d := id.refused(in, policy.BadRequest)
	id.logDenied(ctx, in, d, why)
	id.tell(ctx, in, d)
	return d
}

type callKey struct{}

type callInfo struct {
	peer     *svid.Peer
	decision policy.Decision
}

// PeerFromContext says who made the call that a handler behind httpauth or
// grpcauth serves.
func PeerFromContext(ctx context.Context) (*svid.Peer, bool) {
	call, ok := ctx.Value(callKey{}).(*callInfo)
	if !ok || call.peer == nil {
		return nil, false
	}
	return call.peer, true
}

// DecisionFromContext gives the decision on the call that a handler behind
// httpauth or grpcauth serves.
func DecisionFromContext(ctx context.Context) (policy.Decision, bool) {
	call, ok := ctx.Value(callKey{}).(*callInfo)
	if !ok {
		return policy.Decision{}, false
	}
	return call.decision, true
}

// limitedLog writes at most perSecond lines a second, and says how many it
// left out: whoever can connect can cause them.
type limitedLog struct {
	level slog.Level // the zero value is Info

	mu      sync.Mutex // guards the rest
	second  int64
	written int
	dropped int
}

const linesPerSecond = 20

func (l *limitedLog) log(ctx context.Context, log *slog.Logger, msg string, attrs ...slog.Attr) {
	if !log.Enabled(ctx, l.level) {
		return
	}
	l.mu.Lock()
	if now := time.Now().Unix(); now != l.second {
		l.second, l.written = now, 0
	}
	if l.written >= linesPerSecond {
		l.dropped++
		l.mu.Unlock()
		return
	}
	l.written++
	if l.dropped > 0 {
		attrs = append(attrs, slog.Int("lines_dropped", l.dropped))
		l.dropped = 0
	}
	l.mu.Unlock()
	log.LogAttrs(ctx, l.level, msg, attrs...) //nolint:sloglint // msg is constant at every caller
}

// condition logs when something goes wrong and when it is well again, not
// each time in between.
type condition struct{ bad atomic.Bool }

func (c *condition) trouble(ctx context.Context, log *slog.Logger, msg string, err error) {
	if !c.bad.Swap(true) {
		log.LogAttrs(ctx, slog.LevelWarn, msg, slog.Any("err", err)) //nolint:sloglint // as above
	}
}

func (c *condition) fine(ctx context.Context, log *slog.Logger, msg string) {
	if c.bad.Load() && c.bad.Swap(false) { // Load first: the cheap case is the common one
		log.LogAttrs(ctx, slog.LevelInfo, msg) //nolint:sloglint // as above
	}
}

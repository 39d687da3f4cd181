// The agent of one workload: the SPIFFE Workload API and Merlon's local API
// over a real Unix socket, or in memory. Who connects is taken for the workload
// without a look.

package sdktest

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/option"
	"merlon.dev/sdk/unixsock"
)

// heartbeat is how often Watch says something at least.
const heartbeat = 15 * time.Second

type agent struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	agentpb.UnimplementedLocalServer

	td   *TD
	id   spiffeid.ID
	path string
	svid *x509svid.SVID // guarded by td.mu; nil: withdrawn

	mu     sync.Mutex // guards the rest
	server *grpc.Server
	done   chan struct{} // closed when Serve has returned
}

func (a *agent) start() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server != nil {
		return nil
	}
	lis, creds, err := a.listen()
	if err != nil {
		return err
	}
	server := grpc.NewServer(
		grpc.Creds(creds),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := checkHeader(stream.Context()); err != nil {
				return err
			}
			return next(srv, stream)
		}),
	)
	workload.RegisterSpiffeWorkloadAPIServer(server, a)
	agentpb.RegisterLocalServer(server, a)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(lis) // it ends by stop
	}()
	a.server, a.done = server, done
	return nil
}

func (a *agent) listen() (net.Listener, credentials.TransportCredentials, error) {
	if m := a.td.memory; m != nil {
		lis, err := m.listen(a.address())
		return lis, insecure.NewCredentials(), err
	}
	lis, err := unixsock.Listen(a.path, unixsock.Public)
	return lis, unixsock.ServerCredentials(), err
}

// address is for a network in memory.
func (a *agent) address() address { return address{"agent", a.id.String()} }

// reached is the option by which the workload's processes reach the agent, and, in
// memory, each other.
func (a *agent) reached(o *option.Set) {
	m := a.td.memory
	if m == nil {
		o.Address = "unix://" + a.path
		return
	}
	name := strings.TrimPrefix(a.id.Path(), "/")
	o.Address = "unix:///in/memory"
	o.Agent = func(ctx context.Context) (net.Conn, error) { return m.dial(ctx, name, a.address()) }
	o.Dial = func(ctx context.Context, network, to string) (net.Conn, error) {
		return m.dial(ctx, name, address{network, to})
	}
}

func (a *agent) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server == nil {
		return
	}
	a.server.Stop()
	<-a.done
	a.server = nil
}

func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get("workload.spiffe.io"), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

// FetchX509SVID implements the Workload API.
func (a *agent) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	for {
		res, changed, err := a.identity()
		if err != nil {
			return err
		}
		if err := stream.Send(res); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (a *agent) identity() (*workload.X509SVIDResponse, <-chan struct{}, error) {
	// First whom it is to be told of, then what: a change in between is told, too.
	federated, changed := a.td.federated()
	a.td.mu.Lock()
	defer a.td.mu.Unlock()
	if a.svid == nil {
		st, err := status.New(codes.PermissionDenied, "no registration entry matches").WithDetails(
			&errdetails.ErrorInfo{Reason: string(sdk.NoMatchingEntry), Domain: sdk.Domain})
		if err != nil {
			return nil, nil, err
		}
		return nil, nil, st.Err()
	}
	chain, key, err := a.svid.MarshalRaw()
	if err != nil {
		return nil, nil, err
	}
	var bundle []byte
	for _, root := range a.td.roots {
		bundle = append(bundle, root.cert.Raw...)
	}
	return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId:    a.id.String(),
		X509Svid:    chain,
		X509SvidKey: key,
		Bundle:      bundle,
	}}, FederatedBundles: federated}, changed, nil
}

// Watch implements the local API. Each message has everything.
func (a *agent) Watch(_ *agentpb.WatchRequest, stream grpc.ServerStreamingServer[agentpb.WatchResponse]) error {
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		res, changed := a.td.watchResponse()
		if err := stream.Send(res); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (td *TD) watchResponse() (*agentpb.WatchResponse, <-chan struct{}) {
	td.mu.Lock()
	defer td.mu.Unlock()
	res := &agentpb.WatchResponse{PolicyGeneration: td.policyGen, Reset_: true, RevocationsAsOf: timestamppb.Now(), PolicyAsOf: timestamppb.Now(), DenyPolicyAfter: durationpb.New(td.maxAge), TaintedAuthorityIds: td.tainted}
	for _, r := range td.revoked {
		res.Revocations = append(res.Revocations, &agentpb.Revocation{
			Subject:        &agentpb.Revocation_SpiffeId{SpiffeId: r.SPIFFEID},
			BeforeRevision: r.BeforeRevision,
			Realm:          r.Realm,
			ExpiresAt:      timestamppb.New(r.ExpiresAt),
			Note:           r.Note,
		})
	}
	return res, td.changed
}

// Authorize implements the local API.
func (a *agent) Authorize(_ context.Context, req *agentpb.AuthorizeRequest) (*agentpb.AuthorizeResponse, error) {
	if req.GetDestination() != "" && req.GetDestination() != a.id.String() {
		return nil, status.Error(codes.PermissionDenied, "the destination is not the caller")
	}
	in := &policy.Input{
		Source:             req.GetSource(),
		Destination:        a.id.String(),
		Protocol:           policy.Protocol(req.GetProtocol()),
		Method:             req.GetMethod(),
		Path:               req.GetPath(),
		Query:              req.GetQuery(),
		Host:               req.GetHost(),
		SourceAddress:      req.GetSourceAddress(),
		DestinationAddress: req.GetDestinationAddress(),
		SourceSerial:       req.GetSourceSerial(),
	}
	if len(req.GetHeaders()) > 0 {
		headers := make(policy.HeaderMap, len(req.GetHeaders()))
		for name, values := range req.GetHeaders() {
			headers[name] = values.GetValues()
		}
		in.Headers = headers
	}
	d := a.td.authorize(in)
	return &agentpb.AuthorizeResponse{Decision: &agentpb.Decision{
		Allow:            d.Allow,
		Reason:           string(d.Reason),
		RuleId:           d.RuleID,
		DecisionId:       d.DecisionID.String(),
		PolicyGeneration: d.Revision,
		Response:         responseToPB(d.Response),
	}}, nil
}

func responseToPB(r *policy.Response) *agentpb.Response {
	if r == nil {
		return nil
	}
	fields := func(of []policy.HeaderField) (pb []*agentpb.HeaderField) {
		for _, f := range of {
			pb = append(pb, &agentpb.HeaderField{Name: f.Name, Value: f.Value})
		}
		return pb
	}
	return &agentpb.Response{
		Status: uint32(r.Status), Body: r.Body, Headers: fields(r.Headers), ResponseHeaders: fields(r.ResponseHeaders), RemoveHeaders: r.RemoveHeaders,
	}
}

// The spans and durations of gRPC calls, at both ends, and the trace that goes with
// them, for interceptors.
//
// otelgrpc has all of it, but as a stats.Handler, with which gRPC allocates on each
// call even where nobody listens.

package telemetry

import (
	"context"
	"strings"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// RPC is one gRPC call under way. A nil RPC tells nobody.
type RPC struct {
	*Call
	once sync.Once // gRPC and a failed start may both end it
}

// Arrived begins to tell of a call that this server has got. Where otelgrpc does so
// already, it is left to that.
func Arrived(ctx context.Context, method string) (context.Context, *RPC) {
	t := Current()
	if t == nil || TracedAbove(ctx) {
		return ctx, nil
	}
	var more []attribute.KeyValue
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		more = append(more, attribute.String("network.peer.address", p.Addr.String()))
	}
	md, _ := metadata.FromIncomingContext(ctx)
	name, shared := aboutRPC(method)
	ctx, call := t.Begin(Propagator().Extract(ctx, carrier(md)), RPCServer, name, shared, more)
	return ctx, &RPC{Call: call}
}

// Answered tells of the end of a call that was served. Of the errors some are the
// caller's.
func (r *RPC) Answered(err error) {
	if r == nil {
		return
	}
	r.end(err, IsServers)
}

// IsServers says whether an answer with code c is an error of the server, and not of
// its caller.
func IsServers(c codes.Code) bool {
	switch c {
	case codes.Unknown, codes.DeadlineExceeded, codes.Unimplemented, codes.Internal, codes.Unavailable, codes.DataLoss:
		return true
	}
	return false
}

// Leaves begins to tell of a call that this client makes, and sends the trace with
// it. Where somebody in front does so already, it is left to that.
func Leaves(ctx context.Context, method string, cc *grpc.ClientConn) (context.Context, *RPC) {
	t := Current()
	if t == nil {
		return ctx, nil
	}
	md, _ := metadata.FromOutgoingContext(ctx) // a copy
	if len(md["traceparent"]) > 0 {
		return ctx, nil
	}
	name, shared := aboutRPC(method)
	shared = append(shared, addressOf(cc.CanonicalTarget())...)
	ctx, call := t.Begin(ctx, RPCClient, name, shared, nil)
	if md == nil {
		md = metadata.MD{}
	}
	Propagator().Inject(ctx, carrier(md))
	return metadata.NewOutgoingContext(ctx, md), &RPC{Call: call}
}

// Over tells of the end of a call that was made. To its caller each error is one.
func (r *RPC) Over(err error) {
	if r != nil {
		r.once.Do(func() { r.end(err, func(codes.Code) bool { return true }) })
	}
}

func (r *RPC) end(err error, isError func(codes.Code) bool) {
	st, ok := status.FromError(err)
	if !ok {
		st = status.FromContextError(err) // as gRPC does
	}
	code := CodeName(st.Code())
	kind := ""
	if st.Code() != codes.OK && isError(st.Code()) {
		kind = code
	}
	r.Answer(kind, st.Message(), attribute.String("rpc.response.status_code", code))
	r.End()
}

// aboutRPC gives the name of a call and the attributes that say what is called.
func aboutRPC(method string) (name string, attrs []attribute.KeyValue) {
	name = strings.TrimPrefix(method, "/")
	return name, append(make([]attribute.KeyValue, 0, 4), attribute.String("rpc.system.name", "grpc"), attribute.String("rpc.method", name))
}

// addressOf is where a target, "dns:///host:port" or "unix:/path", leads.
func addressOf(target string) []attribute.KeyValue {
	scheme, rest, _ := strings.Cut(target, ":")
	rest = strings.TrimPrefix(rest, "//")
	if scheme != "unix" && scheme != "unix-abstract" {
		rest = rest[strings.LastIndexByte(rest, '/')+1:]
	}
	return ServerAddress(rest, 0)
}

// carrier lets a trace travel in metadata.
type carrier metadata.MD

// Get implements propagation.TextMapCarrier.
func (c carrier) Get(key string) string {
	if values := metadata.MD(c).Get(key); len(values) > 0 {
		return values[0]
	}
	return ""
}

// Set implements propagation.TextMapCarrier.
func (c carrier) Set(key, value string) { metadata.MD(c).Set(key, value) }

// Keys implements propagation.TextMapCarrier.
func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for key := range c {
		keys = append(keys, key)
	}
	return keys
}

// CodeName is a code as the conventions spell it: as google.rpc.Code does.
func CodeName(c codes.Code) string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return "_OTHER"
}

var codeNames = [...]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
	"UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

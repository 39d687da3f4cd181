// What OpenTelemetry is told of gRPC calls: a span and a duration for each, at both
// ends, after its semantic conventions; and the trace goes with the call. Where
// the program has no providers, nothing here runs.
//
// otelgrpc has both, but as a stats.Handler, with which gRPC allocates on each call
// even where nobody listens.

package grpcauth

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

	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/telemetry"
)

// told is a call of which OpenTelemetry is told; nil: of which it is not.
type told struct {
	*telemetry.Call
	once sync.Once // gRPC and a failed start may both end it
}

// arrived begins to tell of a call that this server has got. Where otelgrpc does so
// already, it is left to that.
func arrived(ctx context.Context, method string) (context.Context, *told) {
	t := telemetry.Current()
	if t == nil || telemetry.TracedAbove(ctx) {
		return ctx, nil
	}
	var more []attribute.KeyValue
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		more = append(more, attribute.String("network.peer.address", p.Addr.String()))
	}
	md, _ := metadata.FromIncomingContext(ctx)
	name, shared := about(method)
	ctx, call := t.Begin(telemetry.Propagator().Extract(ctx, carrier(md)), telemetry.RPCServer, name, shared, more)
	return ctx, &told{Call: call}
}

// answered tells of the end of a call that was served. Of the errors some are the
// caller's.
func (t *told) answered(err error) {
	if t == nil {
		return
	}
	t.end(err, func(c codes.Code) bool {
		switch c {
		case codes.Unknown, codes.DeadlineExceeded, codes.Unimplemented, codes.Internal, codes.Unavailable, codes.DataLoss:
			return true
		}
		return false
	})
}

// leaves begins to tell of a call that this client makes, and sends the trace with
// it. Where somebody in front does so already, it is left to that.
func leaves(ctx context.Context, method string, cc *grpc.ClientConn) (context.Context, *told) {
	t := telemetry.Current()
	if t == nil {
		return ctx, nil
	}
	md, _ := metadata.FromOutgoingContext(ctx) // a copy
	if len(md["traceparent"]) > 0 {
		return ctx, nil
	}
	name, shared := about(method)
	shared = append(shared, addressOf(cc.CanonicalTarget())...)
	ctx, call := t.Begin(ctx, telemetry.RPCClient, name, shared, nil)
	if md == nil {
		md = metadata.MD{}
	}
	telemetry.Propagator().Inject(ctx, carrier(md))
	return metadata.NewOutgoingContext(ctx, md), &told{Call: call}
}

// over tells of the end of a call that was made. To its caller each error is one,
// and a denial says by which decision.
func (t *told) over(err error) {
	if t == nil {
		return
	}
	t.once.Do(func() {
		if denied, ok := sdk.DeniedFromStatus(err); ok {
			telemetry.Denied(t.Context(), denied.Reason, denied.DecisionID, denied.Error())
		}
		t.end(err, func(codes.Code) bool { return true })
	})
}

func (t *told) end(err error, isError func(codes.Code) bool) {
	st := status.Convert(err)
	code := nameOf(st.Code())
	kind := ""
	if st.Code() != codes.OK && isError(st.Code()) {
		kind = code
	}
	t.Answer(kind, st.Message(), attribute.String("rpc.response.status_code", code))
	t.End()
}

// about gives the name of a call and the attributes that say what is called.
func about(method string) (name string, attrs []attribute.KeyValue) {
	name = strings.TrimPrefix(method, "/")
	return name, append(make([]attribute.KeyValue, 0, 4), attribute.String("rpc.system.name", "grpc"), attribute.String("rpc.method", name))
}

// addressOf is where a target, "dns:///host:port" or "unix:/path", leads.
func addressOf(target string) []attribute.KeyValue {
	scheme, rest, _ := strings.Cut(target, ":")
	if scheme != "unix" && scheme != "unix-abstract" {
		rest = rest[strings.LastIndexByte(rest, '/')+1:]
	}
	return telemetry.ServerAddress(rest, 0)
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

// nameOf is a code as the conventions spell it: as google.rpc.Code does.
func nameOf(c codes.Code) string {
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

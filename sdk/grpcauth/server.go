// The server's side: every call, unary or stream, is put to the policy before
// its handler runs.

package grpcauth

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"maps"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/telemetry"
)

// ServerOptions are the options with which a grpc.Server accepts only mutual
// TLS and asks the policy about every call. Handlers find peer and decision by
// sdk.PeerFromContext and sdk.DecisionFromContext. Connections are asked to
// come back on a new one after a quarter of the X509-SVID's life; put your own
// keepalive parameters behind these options to change that.
//
// A call that is under way when the policy stops allowing it ends with
// PermissionDenied, as one that is new; its handler's context ends with it.
//
// Interceptors of your own that you pass behind these options run after the
// decision.
func ServerOptions(id *sdk.Identity) []grpc.ServerOption {
	s := &server{id: id}
	opts := []grpc.ServerOption{
		grpc.Creds(&creds{id: id}),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
	}
	if svid, err := id.GetX509SVID(); err == nil {
		leaf := svid.Certificates[0]
		age := max(leaf.NotAfter.Sub(leaf.NotBefore)/4, time.Second)
		opts = append(opts, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: age}))
	}
	return opts
}

type server struct{ id *sdk.Identity }

func (s *server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, told := telemetry.Arrived(ctx, info.FullMethod)
	reply, err := s.serveUnary(ctx, req, info, next)
	told.Answered(err)
	return reply, err
}

func (s *server) serveUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, call, err := s.decide(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	ctx, live := s.follow(ctx, call)
	defer live.stop()
	reply, err := next(ctx, req)
	if denied := live.denied(); denied != nil {
		return nil, denied
	}
	return reply, err
}

func (s *server) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, told := telemetry.Arrived(stream.Context(), info.FullMethod)
	err := s.serveStream(ctx, srv, stream, info, next)
	told.Answered(err)
	return err
}

func (s *server) serveStream(ctx context.Context, srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, call, err := s.decide(ctx, info.FullMethod)
	if err != nil {
		return err
	}
	ctx, live := s.follow(ctx, call)
	defer live.stop()
	return live.run(&decidedStream{ServerStream: stream, ctx: ctx, live: live}, func(ds grpc.ServerStream) error { return next(srv, ds) })
}

// decided is a call that the policy allows.
type decided struct {
	in       *policy.Input
	decision policy.Decision
	state    *tls.ConnectionState
}

// unknown is the connection of nobody that we know. It is never written to.
var unknown tls.ConnectionState

// decide puts one call to the policy. A denial is the error to answer with.
func (s *server) decide(ctx context.Context, served string) (context.Context, decided, error) {
	in := &policy.Input{Protocol: policy.GRPC, Method: "POST"}
	state := &unknown
	if p, ok := peer.FromContext(ctx); ok {
		switch info := p.AuthInfo.(type) {
		case credentials.TLSInfo:
			state = &info.State
		case plaintextInfo:
			state = nil
		}
		if p.Addr != nil {
			in.SourceAddress = p.Addr.String()
		}
		if p.LocalAddr != nil {
			in.DestinationAddress = p.LocalAddr.String()
		}
	}
	ctx = s.headers(ctx, in)
	sent, err := exactMethod(ctx, served)
	in.Path = sent
	if err != nil {
		return nil, decided{}, denial(s.id.Refuse(ctx, state, in, err))
	}
	ctx, decision := s.id.Decide(ctx, state, in)
	if !decision.Allow {
		return nil, decided{}, withFields(ctx, decision)
	}
	return asDecided(ctx, decision.Response), decided{in, decision, state}, nil
}

// withFields is the error of a denied call, before anything was answered: the fields
// that the policy wants go in front.
func withFields(ctx context.Context, d policy.Decision) error {
	if d.Response != nil && len(d.Response.Headers) > 0 {
		_ = grpc.SetHeader(ctx, metadataOf(d.Response.Headers)) // who has gone needs none
	}
	return denial(d)
}

// asDecided gives the context that a handler is to see: with the policy's metadata in
// the place of the caller's of the same names, and without what it takes away.
func asDecided(ctx context.Context, send *policy.Response) context.Context {
	if send == nil {
		return ctx
	}
	if len(send.ResponseHeaders) > 0 {
		_ = grpc.SetHeader(ctx, metadataOf(send.ResponseHeaders)) // likewise
	}
	md, _ := metadata.FromIncomingContext(ctx) // a copy
	maps.DeleteFunc(md, func(name string, _ []string) bool { return send.Replaces(name) })
	return metadata.NewIncomingContext(ctx, metadata.Join(md, metadataOf(send.Headers)))
}

func metadataOf(fields []policy.HeaderField) metadata.MD {
	md := metadata.MD{}
	for _, f := range fields {
		md.Append(f.Name, f.Value)
	}
	return md
}

// denial is the error of a denied call, with ErrorInfo.
func denial(d policy.Decision) error { return sdk.DeniedBy(d).GRPCStatus().Err() }

// exactMethod gives the :path of the stream as it was sent, unless it is
// anything but "/package.Service/Method", or not the method that is about to
// be served (T15).
func exactMethod(ctx context.Context, served string) (string, error) {
	sent, ok := grpc.Method(ctx)
	if !ok {
		return "", errors.New("the stream has no method")
	}
	if err := policy.CheckPath(sent); err != nil {
		return sent, err
	}
	if service, method, ok := strings.Cut(sent[1:], "/"); !ok || service == "" || method == "" || strings.Contains(method, "/") {
		return sent, errors.New("a gRPC path is /package.Service/Method")
	}
	if sent != served {
		return sent, errors.New("the path names another method than the one that would be served")
	}
	return sent, nil
}

// headers puts the metadata into in, and takes out of ctx what claims an
// identity; only TLS says who the caller is (T13).
func (s *server) headers(ctx context.Context, in *policy.Input) context.Context {
	md, ok := metadata.FromIncomingContext(ctx) // a copy, with names in lower case
	if !ok {
		return ctx
	}
	stripped := false
	for name := range md {
		if policy.ClaimsIdentity(name) {
			delete(md, name)
			stripped = true
		}
	}
	if stripped {
		ctx = metadata.NewIncomingContext(ctx, md.Copy())
	}
	in.Headers = make(map[string][]string, len(md))
	for name, values := range md {
		switch {
		case name == ":authority":
			if len(values) > 0 {
				in.Host = values[0]
			}
		case strings.HasPrefix(name, ":"):
		case strings.HasSuffix(name, "-bin"):
			in.Headers[name] = onTheWire(values)
		default:
			in.Headers[name] = values
		}
	}
	return ctx
}

// onTheWire encodes binary metadata again, as it travels.
func onTheWire(values []string) []string {
	out := make([]string, len(values))
	for i, v := range values {
		out[i] = base64.RawStdEncoding.EncodeToString([]byte(v))
	}
	return out
}

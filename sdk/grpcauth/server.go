// The server's side: every call, unary or stream, is put to the policy before
// its handler runs.

package grpcauth

import (
	"context"
	"errors"
	"maps"
	"net"
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
// come back on a new one after a quarter of the X509-SVID's life, or of an hour if
// there is none yet; put your own keepalive parameters behind these options to change that.
//
// A call that is under way when the policy stops allowing it ends with
// PermissionDenied, as one that is new; its handler's context ends with it.
//
// Interceptors of your own that you pass behind these options, by
// grpc.ChainUnaryInterceptor and grpc.ChainStreamInterceptor, run after the decision.
// One of grpc.UnaryInterceptor or grpc.StreamInterceptor runs before it, wherever it
// stands, for everybody whose handshake is good, and without peer and decision.
func ServerOptions(id *sdk.Identity) []grpc.ServerOption {
	s := &server{id: id}
	life := time.Hour // an X509-SVID's where nothing else is said
	if svid, err := id.GetX509SVID(); err == nil {
		leaf := svid.Certificates[0]
		life = leaf.NotAfter.Sub(leaf.NotBefore)
	}
	return []grpc.ServerOption{
		grpc.Creds(&creds{id: id}),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: max(life/4, time.Second)}),
	}
}

type server struct{ id *sdk.Identity }

func (s *server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, told := telemetry.Arrived(ctx, info.FullMethod)
	reply, err := s.serveUnary(ctx, req, info, next)
	told.Answered(err)
	return reply, err
}

func (s *server) serveUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	call, err := s.begin(ctx, info.FullMethod, nil)
	if err != nil {
		return nil, err
	}
	defer call.End()
	reply, err := next(asDecided(call), req)
	if d, ended := call.Denied(); ended {
		return nil, denial(d)
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
	over := make(chan struct{})
	call, err := s.begin(ctx, info.FullMethod, func(policy.Decision) { close(over) })
	if err != nil {
		return err
	}
	defer call.End()
	live := &liveStream{call: call, over: over}
	return live.run(&decidedStream{ServerStream: stream, ctx: asDecided(call), live: live}, func(ds grpc.ServerStream) error { return next(srv, ds) })
}

// begin puts one call to the policy. A denial is the error to answer with; else the
// call is under way, and ended, unless nil, is told when the policy ends it.
func (s *server) begin(ctx context.Context, served string, ended func(policy.Decision)) (*sdk.Call, error) {
	in := &policy.Input{Protocol: policy.GRPC, Method: "POST"}
	var info credentials.TLSInfo // the zero value is the connection of nobody that we know
	state := &info.State
	if from, ok := peer.FromContext(ctx); ok {
		switch auth := from.AuthInfo.(type) {
		case credentials.TLSInfo:
			info = auth
		case plaintextInfo:
			state = nil
		}
		if _, known := s.id.Peer(state); !known { // else the connection tells the addresses
			in.SourceAddress, in.DestinationAddress = text(from.Addr), text(from.LocalAddr)
		}
	}
	ctx = headers(ctx, in)
	sent, err := exactMethod(ctx, served)
	in.Path = sent
	if err != nil {
		return nil, denial(s.id.Refuse(ctx, state, in, err))
	}
	call := s.id.Begin(ctx, state, in, ended)
	if d := call.Decision(); !d.Allow {
		call.End()
		return nil, withFields(ctx, d)
	}
	return call, nil
}

func text(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
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
func asDecided(call *sdk.Call) context.Context {
	send := call.Decision().Response
	if send == nil {
		return call
	}
	if len(send.ResponseHeaders) > 0 {
		_ = grpc.SetHeader(call, metadataOf(send.ResponseHeaders)) // likewise
	}
	md, _ := metadata.FromIncomingContext(call) // a copy
	maps.DeleteFunc(md, func(name string, _ []string) bool { return send.Replaces(name) })
	return metadata.NewIncomingContext(call, metadata.Join(md, metadataOf(send.Headers)))
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

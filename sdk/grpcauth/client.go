// The client's side: mutual TLS to one expected SPIFFE ID, and denials as
// typed errors that are still gRPC statuses.

package grpcauth

import (
	"context"
	"net"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"

	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/telemetry"
)

// DialOptions are the options with which a grpc.ClientConn connects to exactly
// one SPIFFE ID, whatever the address. A call that the other side's policy
// denies fails with a *sdk.DeniedError, of which status.Code is still
// PermissionDenied.
func DialOptions(id *sdk.Identity, to sdk.Target) []grpc.DialOption {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(&creds{id: id, to: to}),
		grpc.WithChainUnaryInterceptor(unaryClient),
		grpc.WithChainStreamInterceptor(streamClient),
	}
	if dial := id.Dialer(); dial != nil {
		opts = append(opts, grpc.WithResolvers(unresolved{resolver.Get("passthrough")}), grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dial(ctx, "tcp", address)
		}))
	}
	return opts
}

// unresolved stands for DNS where addresses are not of the net package.
type unresolved struct{ resolver.Builder }

// Scheme implements resolver.Builder.
func (unresolved) Scheme() string { return "dns" }

func unaryClient(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	ctx, told := telemetry.Leaves(ctx, method, cc)
	err := typed(invoke(ctx, method, req, reply, cc, opts...))
	over(told, err)
	return err
}

func streamClient(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	ctx, told := telemetry.Leaves(ctx, method, cc)
	if told != nil {
		opts = append(slices.Clip(opts), grpc.OnFinish(func(err error) { over(told, err) }))
	}
	stream, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		over(told, err)
		return nil, typed(err)
	}
	return &typedStream{stream}, nil
}

// typedStream makes the errors with which a stream ends typed.
type typedStream struct{ grpc.ClientStream }

// RecvMsg implements grpc.ClientStream.
func (s *typedStream) RecvMsg(m any) error { return typed(s.ClientStream.RecvMsg(m)) }

// Header implements grpc.ClientStream.
func (s *typedStream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	return md, typed(err)
}

// typed turns a Merlon denial into a *sdk.DeniedError.
func typed(err error) error {
	if err == nil {
		return nil
	}
	if denied, ok := sdk.DeniedFromStatus(err); ok {
		return denied
	}
	return err
}

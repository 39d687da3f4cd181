// The client's side: mutual TLS to one expected SPIFFE ID, and denials as
// typed errors that are still gRPC statuses.

package grpcauth

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"merlon.dev/sdk"
)

// DialOptions are the options with which a grpc.ClientConn connects to exactly
// one SPIFFE ID, whatever the address. A call that the other side's policy
// denies fails with a *sdk.DeniedError, of which status.Code is still
// PermissionDenied.
func DialOptions(id *sdk.Identity, to sdk.Target) []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithTransportCredentials(&creds{id: id, to: to}),
		grpc.WithChainUnaryInterceptor(unaryClient),
		grpc.WithChainStreamInterceptor(streamClient),
	}
}

func unaryClient(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return typed(invoke(ctx, method, req, reply, cc, opts...))
}

func streamClient(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
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

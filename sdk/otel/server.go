// gRPC servers of Merlon's own processes, which the SDK does not serve.

package otel

import (
	"context"

	"google.golang.org/grpc"

	"merlon.dev/sdk/internal/telemetry"
)

// ServerOptions have a grpc.Server tell OpenTelemetry of each call, as those of
// grpcauth do. They belong in front of options with interceptors that refuse calls.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			ctx, told := telemetry.Arrived(ctx, info.FullMethod)
			reply, err := next(ctx, req)
			told.Answered(err)
			return reply, err
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			ctx, told := telemetry.Arrived(stream.Context(), info.FullMethod)
			if told != nil {
				stream = &toldStream{stream, ctx}
			}
			err := next(srv, stream)
			told.Answered(err)
			return err
		}),
	}
}

// toldStream has the span of the call in its context.
type toldStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s *toldStream) Context() context.Context { return s.ctx }

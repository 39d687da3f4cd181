// The gRPC health protocol over the same checks: service "" is the whole
// process, any other service name is the check of that name.

package health

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// watchInterval is how often a Watch looks at the checks, which are functions
// and so cannot announce a change.
const watchInterval = time.Second

// GRPC returns the health service to register on a gRPC server.
func (s *Server) GRPC() healthgrpc.HealthServer { return grpcHealth{server: s} }

type grpcHealth struct {
	healthgrpc.UnimplementedHealthServer
	server *Server
}

// Check answers for the whole process or for one check; NOT_FOUND for a name
// that is no check.
func (g grpcHealth) Check(_ context.Context, req *healthgrpc.HealthCheckRequest) (*healthgrpc.HealthCheckResponse, error) {
	answer := g.server.servingStatus(req.GetService())
	if answer == healthgrpc.HealthCheckResponse_SERVICE_UNKNOWN {
		return nil, status.Error(codes.NotFound, "no readiness check has this name")
	}
	return &healthgrpc.HealthCheckResponse{Status: answer}, nil
}

// List answers for the whole process and for every check.
func (g grpcHealth) List(context.Context, *healthgrpc.HealthListRequest) (*healthgrpc.HealthListResponse, error) {
	report := g.server.Report()
	statuses := map[string]*healthgrpc.HealthCheckResponse{"": {Status: serving(report.Ready)}}
	for name, result := range report.Checks {
		statuses[name] = &healthgrpc.HealthCheckResponse{Status: serving(result.OK)}
	}
	return &healthgrpc.HealthListResponse{Statuses: statuses}, nil
}

// Watch sends the status now and each time it is found changed, until the
// caller goes or the server stops.
func (g grpcHealth) Watch(req *healthgrpc.HealthCheckRequest, stream grpc.ServerStreamingServer[healthgrpc.HealthCheckResponse]) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	last := healthgrpc.HealthCheckResponse_UNKNOWN
	for {
		stopping := g.server.isStopping() // before the look: NOT_SERVING is told first
		if now := g.server.servingStatus(req.GetService()); now != last {
			if err := stream.Send(&healthgrpc.HealthCheckResponse{Status: now}); err != nil {
				return err
			}
			last = now
		}
		if stopping {
			return status.Error(codes.Unavailable, "the process is stopping")
		}
		select {
		case <-tick.C:
		case <-g.server.stopping:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}

// servingStatus looks up one service name of the health protocol.
func (s *Server) servingStatus(service string) healthgrpc.HealthCheckResponse_ServingStatus {
	report := s.Report()
	if service == "" {
		return serving(report.Ready)
	}
	result, ok := report.Checks[service]
	if !ok {
		return healthgrpc.HealthCheckResponse_SERVICE_UNKNOWN
	}
	return serving(result.OK && !s.isStopping())
}

func serving(ok bool) healthgrpc.HealthCheckResponse_ServingStatus {
	if ok {
		return healthgrpc.HealthCheckResponse_SERVING
	}
	return healthgrpc.HealthCheckResponse_NOT_SERVING
}

// The end of a server: it waits for nobody for long.

package endpoint

import (
	"context"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
)

const (
	// drain is how long calls that are under way get to finish. Streams have no end of
	// their own.
	drain = 500 * time.Millisecond
	// leaveAfter is how long calls get to return once they are cut off. One that does not
	// look at its context must not keep the process.
	leaveAfter = 2 * time.Second
)

// Serve runs s on lis until ctx ends. cut has to close every connection, also of who has
// not said anything yet: gRPC waits for his first words.
func Serve(ctx context.Context, s *grpc.Server, lis net.Listener, cut func(), log *slog.Logger) error {
	served, ended := make(chan error, 1), make(chan struct{})
	go func() { served <- s.Serve(lis) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	go func() {
		defer close(ended)
		s.GracefulStop()
	}()
	if !within(drain, ended) {
		cut()
		s.Stop()
		if !within(leaveAfter, ended) {
			log.LogAttrs(ctx, slog.LevelWarn, "calls have not ended with their connections; they are left behind")
		}
	}
	return <-served
}

// within says whether done was closed before d was over.
func within(d time.Duration, done <-chan struct{}) bool {
	patience := time.NewTimer(d)
	defer patience.Stop()
	select {
	case <-done:
		return true
	case <-patience.C:
		return false
	}
}

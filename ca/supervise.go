// What the CA says to the service manager that started it: that it is ready,
// stops, or still lives.

package ca

import (
	"context"
	"fmt"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/systemd"
)

// runUnder is Run for a process that is the CA's alone.
func (s *Server) runUnder(ctx context.Context, manager *systemd.Manager) error {
	s.alone = true
	var aside sync.WaitGroup
	defer aside.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer context.AfterFunc(ctx, manager.Stopping)()
	aside.Go(func() { manager.Hangups(ctx) })
	aside.Go(func() {
		select {
		case <-ctx.Done():
			return
		case <-s.ready:
		}
		manager.Ready("serving trust domain " + s.td.Name())
		manager.Watch(ctx, s.alive)
	})
	return s.Run(ctx)
}

// alive looks for the watchdog whether the CA still answers on its admin socket,
// whatever it answers: a store that is away is no reason to be killed.
func (s *Server) alive(ctx context.Context) error {
	cc, err := grpc.NewClient("unix:"+s.cfg.AdminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	_, err = healthgrpc.NewHealthClient(cc).Check(ctx, &healthgrpc.HealthCheckRequest{})
	if code := status.Code(err); code == codes.Unavailable || code == codes.DeadlineExceeded {
		return fmt.Errorf("the admin socket does not answer: %w", err)
	}
	return nil
}

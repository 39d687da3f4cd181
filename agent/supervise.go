// What the agent and the service manager say to each other: sockets that were
// opened for it and outlive it, that it is ready, stops, or still lives.

package agent

import (
	"context"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/systemd"
	"merlon.dev/sdk/unixsock"
)

// meetManager takes what systemd passed, where this process is the agent's
// alone.
func (a *Agent) meetManager() (passed systemd.Sockets, err error) {
	if !a.cfg.Supervised {
		return nil, nil
	}
	if a.manager, err = systemd.Open(a.log); err != nil {
		return nil, err
	}
	a.manager.Status("waiting for the CA")
	passed, err = systemd.TakeSockets()
	if err != nil {
		return nil, err
	}
	for path := range passed {
		if path != a.cfg.PublicSocket && path != a.cfg.AdminSocket {
			passed.Close()
			return nil, &InvalidError{
				Field: "public_socket", Reason: fmt.Sprintf("systemd opened %s, which is neither public_socket (%s) nor admin_socket (%s)", path, a.cfg.PublicSocket, a.cfg.AdminSocket),
				Hint: "let ListenStream= of the .socket unit and the setting say the same",
			}
		}
	}
	return passed, nil
}

// listen opens the socket at path, unless it was passed.
func listen(path string, access unixsock.Access, passed systemd.Sockets) (net.Listener, error) {
	lis, ok := passed[path]
	if !ok {
		return unixsock.Listen(path, access)
	}
	delete(passed, path)
	if err := unixsock.Adopt(lis, access); err != nil {
		lis.Close()
		return nil, err
	}
	return lis, nil
}

// alive looks for the watchdog whether the agent still answers on its public
// socket, whatever it answers, and whether the node's picture can be looked at.
// That the CA is away is no reason to be killed.
func (a *Agent) alive(ctx context.Context) error {
	cc, err := grpc.NewClient("unix:"+a.cfg.PublicSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	_, err = healthgrpc.NewHealthClient(cc).Check(ctx, &healthgrpc.HealthCheckRequest{})
	if code := status.Code(err); code == codes.Unavailable || code == codes.DeadlineExceeded {
		return fmt.Errorf("the public socket does not answer: %w", err)
	}
	looked := make(chan struct{})
	go func() {
		a.cache.State()
		close(looked)
	}()
	select {
	case <-looked:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("look at the node's picture: %w", ctx.Err())
	}
}

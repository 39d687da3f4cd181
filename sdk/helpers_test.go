// What the tests of this package share: servers to call, and broken agents.

package sdk_test

import (
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"merlon.dev/sdk"
)

var quiet = sdk.WithLogger(slog.New(slog.DiscardHandler))

func serialOf(t *testing.T, id *sdk.Identity) string {
	t.Helper()
	own, err := id.GetX509SVID()
	if err != nil {
		t.Error(err)
		return ""
	}
	return own.Certificates[0].SerialNumber.Text(16)
}

// listen echoes over id.Listener and gives the address.
func listen(t *testing.T, id *sdk.Identity) string {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return echo(t, id.Listener(inner))
}

func echo(t *testing.T, lis net.Listener) string {
	t.Helper()
	var conns sync.WaitGroup
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	}()
	t.Cleanup(func() { lis.Close(); <-done; conns.Wait() })
	return lis.Addr().String()
}

// deadSocket is a socket on which nobody listens any more.
func deadSocket(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "dead.sock")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	lis.(*net.UnixListener).SetUnlinkOnClose(false)
	lis.Close()
	return path
}

// silentAgent holds the stream, as an agent does before its first sync.
func silentAgent(t *testing.T, dir string) string {
	t.Helper()
	return serve(t, filepath.Join(dir, "silent.sock"), func(s *grpc.Server) {
		workload.RegisterSpiffeWorkloadAPIServer(s, silent{})
	})
}

type silent struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (silent) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	<-stream.Context().Done()
	return stream.Context().Err()
}

// emptyServer is a gRPC server without services.
func emptyServer(t *testing.T, dir string) string {
	t.Helper()
	return serve(t, filepath.Join(dir, "empty.sock"), func(*grpc.Server) {})
}

func serve(t *testing.T, path string, register func(*grpc.Server)) string {
	t.Helper()
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	register(server)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(lis) }()
	t.Cleanup(func() { server.Stop(); <-done })
	return path
}

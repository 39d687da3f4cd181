// A server ends although somebody keeps it: who has connected and says nothing, and a
// call that does not look at its context.

package endpoint

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"merlon.dev/sdk/unixsock"
)

// ending is a server with limited connections, whose calls all do what call does.
// stop ends it and gives its log; it fails the test where that does not come to an end.
func ending(t *testing.T, call grpc.StreamHandler) (path string, connections *Limit, stop func() string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "me") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	connections = NewLimit(10)
	server := grpc.NewServer(grpc.Creds(connections.Credentials(func(*unixsock.Peer) {})), grpc.ConnectionTimeout(time.Hour), grpc.UnknownServiceHandler(call))
	var log bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, server, lis, connections.Cut, slog.New(slog.NewTextHandler(&log, nil)))
	}()
	return path, connections, func() string {
		t.Helper()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("the server does not end")
		}
		return log.String()
	}
}

func TestServerEndsAlthoughSomebodySaysNothing(t *testing.T) {
	path, connections, stop := ending(t, func(any, grpc.ServerStream) error { return nil })
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		connections.mu.Lock()
		open := len(connections.open)
		connections.mu.Unlock()
		if open == 1 {
			break
		}
		if time.Since(begun) > 30*time.Second {
			t.Fatal("the connection is not let in")
		}
	}
	if said := stop(); said != "" {
		t.Errorf("said %s", said)
	}
	if len(connections.open) != 0 || len(connections.used) != 0 {
		t.Errorf("%d connections are kept, of %d users; want none", len(connections.open), len(connections.used))
	}
}

func TestServerEndsAlthoughACallDoesNot(t *testing.T) {
	called, release := make(chan struct{}), make(chan struct{})
	path, _, stop := ending(t, func(any, grpc.ServerStream) error {
		close(called)
		<-release
		return nil
	})
	cc, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	stream, err := cc.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/some/Call")
	if err != nil {
		t.Fatal(err)
	}
	<-called
	said := stop()
	close(release)
	if !strings.Contains(said, "they are left behind") {
		t.Errorf("said %q; want that a call is left behind", said)
	}
	if err := stream.RecvMsg(new(struct{})); err == nil {
		t.Error("the caller was not cut off")
	}
}

// An agent that ends does not wait for calls to a CA that does not answer.

package caclient

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

func TestEndOfTheAgentWaitsForNoCall(t *testing.T) {
	cc, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	links := newLinks()
	links.use(&link{cc: cc, address: "ca:1"})
	called, release, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- links.call(t.Context(), func(context.Context, capb.NodeClient) error {
			close(called)
			<-release
			return status.Error(codes.Unavailable, "cut")
		})
	}()
	<-called
	ended := make(chan struct{})
	go func() { defer close(ended); links.end() }()
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		t.Fatal("the end waits for a call")
	}
	if state := cc.GetState(); state != connectivity.Shutdown {
		t.Errorf("the connection is %s; want it closed", state)
	}
	// Who calls from now on, or again, does not wait for another connection.
	close(release)
	select {
	case err := <-done:
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the call ends with %v", err)
		}
	case <-time.After(callTimeout - time.Second):
		t.Error("a call waits for a connection that will not come")
	}
}

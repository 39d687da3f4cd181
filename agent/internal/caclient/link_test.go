// Calls to the CA: an agent that ends waits for none of them, and what failed is
// ordered again when there is a CA to ask.

package caclient

import (
	"context"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/agent/internal/workload"
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

// What failed is ordered again when there is a CA to ask, not at the end of a pause
// that may be longer than SVIDs live.
func TestOrdersAreMadeAgainWhenTheCAIsBack(t *testing.T) {
	const pause = 15 * time.Second // at least half of it
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", "unix:uid:1"))
	away, err := status.New(codes.Unavailable, "away").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(pause)})
	if err != nil {
		t.Fatal(err)
	}
	a := run(t, newDir(t), ca, ca.Address)
	ordering := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ordering <- a.picture.Run(ctx) }()
	defer func() {
		cancel()
		<-ordering
	}()
	a.follows()
	ca.FailSign(away.Err())
	s := a.picture.Subscribe()
	defer s.Close()
	holds := func() bool {
		return len(s.View(workload.Proof{Selectors: []string{"unix:uid:1"}}, true).SVIDs) == 1
	}
	eventually(t, "the order fails", func() bool { return !holds() && len(a.log.lines("SVID not issued")) == 1 })
	failed := time.Now()
	ca.FailSign(nil)
	ca.Stop()
	eventually(t, "the loss is noticed", func() bool { return a.Address() == "" })
	ca.Start()
	eventually(t, "the SVID", holds)
	if took := time.Since(failed); took >= pause/2 {
		t.Errorf("it took %v, which is the pause", took)
	}
}

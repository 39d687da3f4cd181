// What the agent is told when an Identity is closed.

package sdk

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"merlon.dev/agent/agentpb"
)

// counting takes reports, and answers unless it hangs.
type counting struct {
	agentpb.UnimplementedLocalServer
	decided atomic.Uint64
	opened  chan struct{}
	hangs   bool
}

func (c *counting) Report(stream grpc.ClientStreamingServer[agentpb.ReportRequest, agentpb.ReportResponse]) error {
	c.opened <- struct{}{}
	for {
		m, err := stream.Recv()
		if err == io.EOF && !c.hangs { //nolint:errorlint // gRPC gives it as it is
			return stream.SendAndClose(&agentpb.ReportResponse{})
		}
		if err != nil {
			<-stream.Context().Done()
			return err
		}
		for _, n := range m.GetDecided() {
			c.decided.Add(n)
		}
	}
}

// reporting is an Identity with a program, whose reports go to c.
func reporting(t *testing.T, c *counting) (id *Identity, ended <-chan error, cancel context.CancelFunc) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	agentpb.RegisterLocalServer(srv, c)
	go srv.Serve(lis)
	t.Cleanup(srv.Stop)
	id = withProgram(t, 7)
	if id.agent, err = dialAgent(path, &options{UIDs: nil}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(id.agent.close)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	done := make(chan error, 1)
	go func() { done <- id.sendReports(ctx, func() {}) }()
	select {
	case <-c.opened:
	case err := <-done:
		t.Fatal(err)
	}
	return id, done, cancel
}

// Decisions of the last seconds are counted like any other.
func TestTheLastDecisionsAreReported(t *testing.T) {
	c := &counting{opened: make(chan struct{}, 1)}
	id, ended, cancel := reporting(t, c)
	for range 1000 {
		id.Authorize(t.Context(), web("/a"))
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("the stream ends with %v", err)
	}
	if n := c.decided.Load(); n != 1000 {
		t.Errorf("the agent counts %d decisions; want all 1000", n)
	}
}

// An agent that takes nothing delays nobody for long.
func TestAnAgentThatHangsDelaysCloseForAMoment(t *testing.T) {
	id, ended, cancel := reporting(t, &counting{opened: make(chan struct{}, 1), hangs: true})
	id.Authorize(t.Context(), web("/a"))
	cancel()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("nobody has taken the last word")
		}
	case <-time.After(30 * time.Second): // lastWord, on a slow machine
		t.Error("it waits")
	}
}

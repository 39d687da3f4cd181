// An agent that ends between the announcement of a policy and its content. It is played
// here, in a bubble; the same over real processes is row R5 of integration/faults.

package sdk_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/program"
	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/option"
	"merlon.dev/sdk/sdktest"
)

// herald is the agent of orders, which announces what the test tells it to and sends
// what the test gives it. It decides nothing itself.
type herald struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	agentpb.UnimplementedLocalServer
	own *workload.X509SVIDResponse

	mu sync.Mutex
	// guarded by mu
	lis           *bufconn.Listener // nil: it is away
	server        *grpc.Server
	news, content uint64        // versions
	changed       chan struct{} // closed when any of this changes
}

const maxAge = 10 * time.Minute

func (h *herald) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	close(h.changed)
	h.changed = make(chan struct{})
}

// start is another agent, which has a version and perhaps sends it.
func (h *herald) start(news, content uint64) {
	lis, server := bufconn.Listen(1<<20), grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, h)
	agentpb.RegisterLocalServer(server, h)
	h.set(func() { h.lis, h.server, h.news, h.content = lis, server, news, content })
	go func() { _ = server.Serve(lis) }()
	time.Sleep(time.Second)
	synctest.Wait()
}

// say announces, send also sends.
func (h *herald) say(version uint64)  { h.set(func() { h.news = version }); synctest.Wait() }
func (h *herald) send(version uint64) { h.set(func() { h.content = version }); synctest.Wait() }

func (h *herald) die() {
	h.mu.Lock()
	server := h.server
	h.lis = nil
	h.mu.Unlock()
	server.Stop()
	synctest.Wait()
}

func (h *herald) dial(ctx context.Context) (net.Conn, error) {
	h.mu.Lock()
	lis := h.lis
	h.mu.Unlock()
	if lis == nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: net.ErrClosed}
	}
	return lis.DialContext(ctx)
}

// follow calls send with each state until ctx ends.
func (h *herald) follow(ctx context.Context, send func(news, content uint64) error) error {
	for {
		h.mu.Lock()
		news, content, changed := h.news, h.content, h.changed
		h.mu.Unlock()
		if err := send(news, content); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Second):
		}
	}
}

func (h *herald) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := stream.Send(h.own); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

func (h *herald) Watch(_ *agentpb.WatchRequest, stream grpc.ServerStreamingServer[agentpb.WatchResponse]) error {
	return h.follow(stream.Context(), func(news, _ uint64) error {
		return stream.Send(&agentpb.WatchResponse{
			Reset_: true, RevocationsAsOf: timestamppb.Now(), PolicyGeneration: news, PolicyVersion: news,
			PolicyAsOf: timestamppb.Now(), DenyPolicyAfter: durationpb.New(maxAge),
		})
	})
}

func (h *herald) WatchPolicy(_ *agentpb.WatchPolicyRequest, stream grpc.ServerStreamingServer[agentpb.WatchPolicyResponse]) error {
	last := uint64(0)
	return h.follow(stream.Context(), func(_, content uint64) error {
		if content == last {
			return nil
		}
		last = content
		const orders = "spiffe://sdktest.test/orders"
		return stream.Send(&agentpb.WatchPolicyResponse{
			PolicyGeneration: content, PolicyVersion: content,
			Programs: []*agentpb.Program{{Destination: orders, Encoded: program.Encode(&program.Source{
				Destination: orders, Generation: content,
				Grants: []program.Grant{{ID: "all", Kind: program.Allow, Protocol: policy.HTTP, From: []string{"spiffe://sdktest.test/web"}}},
			})}},
		})
	})
}

// heralded is orders under a herald that has sent version 1.
func heralded(t *testing.T) (h *herald, decides func(when string, want policy.Reason, by uint64), log *bytes.Buffer) {
	t.Helper()
	td := sdktest.NewInMemory(t)
	h = &herald{own: message(t, td, td.SVID("orders")), changed: make(chan struct{})}
	h.start(1, 1)
	log = new(bytes.Buffer)
	id, err := sdk.Open(t.Context(), sdk.WithLogger(slog.New(slog.NewTextHandler(&lockedWriter{to: log}, nil))), func(o *option.Set) {
		o.Address, o.Agent = "unix:///in/memory", h.dial
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { id.Close(); h.die() })
	synctest.Wait() // the program is at hand
	return h, func(when string, want policy.Reason, by uint64) {
		t.Helper()
		d := id.Authorize(t.Context(), &policy.Input{Source: "spiffe://sdktest.test/web", Protocol: policy.HTTP, Method: "GET", Path: "/"})
		if d.Reason != want || d.Allow != (want == policy.Allowed) || d.Revision != by {
			t.Errorf("%s: %s by revision %d; want %s by %d", when, d.Reason, d.Revision, want, by)
		}
	}, log
}

// lockedWriter is for several goroutines.
type lockedWriter struct {
	mu sync.Mutex
	to *bytes.Buffer // guarded by mu
}

func (w *lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.to.Write(p)
}

func TestAgentThatEndsBeforeItSendsWhatItAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, decides, log := heralded(t)
		time.Sleep(time.Second)
		decides("at first", policy.Allowed, 1)
		h.say(2)
		said := time.Now()
		h.die()
		for _, after := range []time.Duration{0, time.Second, 3 * time.Second, time.Minute, maxAge - 20*time.Second} {
			time.Sleep(time.Until(said.Add(after)))
			decides("the agent has gone "+after.String()+" ago", policy.Allowed, 1)
		}
		synctest.Wait()
		if got := strings.Count(log.String(), "agent went before it sent the policy that it had announced"); got != 1 {
			t.Errorf("said %d times; want once:\n%s", got, log)
		}
		time.Sleep(time.Until(said.Add(maxAge + time.Second)))
		decides("for longer than a policy may be old", policy.StalePolicy, 0)
		h.start(3, 3)
		decides("the agent is back", policy.Allowed, 3)
	})
}

// T28: an agent that is there does not keep anybody on an old policy, and what it has
// kept back does not decide once it is gone, nor with the next one that keeps it back.
func TestAgentThatKeepsBackWhatItAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, decides, _ := heralded(t)
		for version := uint64(2); version < 6; version++ { // each in the place of the one before
			h.say(version)
			time.Sleep(600 * time.Millisecond)
		}
		decides("kept back", policy.AgentUnavailable, 0)
		h.die()
		time.Sleep(time.Second)
		decides("and the agent is gone", policy.AgentUnavailable, 0)
		h.start(7, 0)
		decides("and another keeps it back", policy.AgentUnavailable, 0)
		h.send(7)
		decides("it has come", policy.Allowed, 7)
	})
}

// Agents that come, announce and end, one after the other, do not make an old policy
// younger.
func TestAgentsThatNeverSendWhatTheyAnnounce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, decides, _ := heralded(t)
		time.Sleep(time.Second)
		begun := time.Now()
		for version := uint64(2); time.Since(begun) < maxAge-20*time.Second; version++ {
			h.die()
			time.Sleep(5 * time.Second)
			decides("no agent", policy.Allowed, 1)
			h.start(version, 0)
		}
		h.die()
		time.Sleep(time.Until(begun.Add(maxAge + time.Second)))
		decides("since the policy was known to be in force it is too old", policy.StalePolicy, 0)
	})
}

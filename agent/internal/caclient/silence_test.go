// A CA that is frozen, or cut off without a word, is given up.

package caclient

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

// scriptedNode answers Sync with messages at the given times, and then with
// silence.
type scriptedNode struct {
	capb.NodeClient
	words []time.Duration
}

func (n *scriptedNode) Sync(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse], error) {
	return &scriptedStream{ctx: ctx, words: n.words}, nil
}

type scriptedStream struct {
	grpc.ClientStream
	ctx   context.Context
	words []time.Duration
}

func (s *scriptedStream) Send(*capb.SyncRequest) error { return nil }

func (s *scriptedStream) Recv() (*capb.SyncResponse, error) {
	if len(s.words) == 0 {
		<-s.ctx.Done()
		return nil, s.ctx.Err()
	}
	time.Sleep(s.words[0])
	s.words = s.words[1:]
	return &capb.SyncResponse{Revision: 1, SentAt: timestamppb.Now()}, nil
}

// newStream is one that is not connected to anything.
func newStream(log *slog.Logger) *stream {
	none := func() uint64 { return 0 }
	c := &Client{
		logs: new(logs),
		cfg: Config{
			Logger: log, Addresses: []string{"ca:1"},
			PolicyGeneration: none, PolicySeen: none, OnPolicyBundle: func(*capb.PolicyBundle) {},
		},
		ackAgain: make(chan struct{}, 1), sawMore: make(chan struct{}, 1),
		standing: newStanding([]string{"ca:1"}, log, prometheus.NewRegistry()), links: newLinks(),
	}
	picture := cache.New(cache.Options{TrustDomain: spiffeid.RequireTrustDomainFromString("shop.test"), Logger: log, Registerer: prometheus.NewRegistry()})
	return &stream{Client: c, picture: picture, link: &link{address: "ca:1"}, patient: true, clock: newClock()}
}

// A replica that has not caught up announces the policy of yesterday.
func TestPolicyOfAnOlderUpdateIsNotAnnounced(t *testing.T) {
	st := newStream(slog.New(slog.DiscardHandler))
	var announced []uint64
	st.cfg.OnPolicyBundle = func(pb *capb.PolicyBundle) { announced = append(announced, pb.GetGeneration()) }
	for _, m := range []*capb.SyncResponse{
		{Reset_: true, Synced: true, Revision: 100, PolicyBundle: &capb.PolicyBundle{Generation: 7}},
		{Synced: true, Revision: 95, PolicyBundle: &capb.PolicyBundle{Generation: 6}},
		{PolicyBundle: &capb.PolicyBundle{Generation: 8}}, // not before the end of the update
		{Synced: true, Revision: 101},
	} {
		if err := st.take(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	if len(announced) != 2 || announced[0] != 7 || announced[1] != 8 {
		t.Errorf("announced generations = %d; want 7 and 8", announced)
	}
}

func TestSilentCAIsGivenUp(t *testing.T) {
	for name, tc := range map[string]struct {
		words []time.Duration
		want  time.Duration
	}{
		"never says a word":        {nil, silence},
		"speaks in time, then not": {[]time.Duration{15 * time.Second, 15 * time.Second, 30 * time.Second}, 60*time.Second + silence},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log := slog.New(slog.DiscardHandler)
				begun := time.Now()
				st := newStream(log)
				st.node = &scriptedNode{words: tc.words}
				err := st.follow(t.Context())
				if !errors.Is(err, errSilent) {
					t.Errorf("error = %v; want %v", err, errSilent)
				}
				if took := time.Since(begun); took != tc.want {
					t.Errorf("given up after %v; want %v", took, tc.want)
				}
			})
		})
	}
}

// A CA that is frozen, or cut off without a word, is given up.

package caclient

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

// word is a message of the CA's: how long after the one before, and what it promises of
// the next one.
type word struct {
	after, within time.Duration
	policy        bool
}

// scriptedNode answers Sync with words, and then with silence, or only when it is asked.
type scriptedNode struct {
	capb.NodeClient
	words   []word
	answers bool
	within  time.Duration // promised in answers
	asks    atomic.Int64
}

func (n *scriptedNode) Sync(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse], error) {
	return &scriptedStream{ctx: ctx, node: n, words: n.words, asked: make(chan struct{}, 1)}, nil
}

type scriptedStream struct {
	grpc.ClientStream
	ctx   context.Context
	node  *scriptedNode
	words []word
	asked chan struct{}
}

func (s *scriptedStream) Send(m *capb.SyncRequest) error {
	if m.GetAsk() > 1 { // the first goes out with the stream
		s.node.asks.Add(1)
		signal(s.asked)
	}
	return nil
}

func (s *scriptedStream) Recv() (*capb.SyncResponse, error) {
	if len(s.words) == 0 {
		if s.node.answers {
			select {
			case <-s.asked:
				return &capb.SyncResponse{Synced: true, Revision: 1, NextWithin: durationpb.New(s.node.within)}, nil
			case <-s.ctx.Done():
			}
		}
		<-s.ctx.Done()
		return nil, s.ctx.Err()
	}
	w := s.words[0]
	s.words = s.words[1:]
	time.Sleep(w.after)
	m := &capb.SyncResponse{Revision: 1, Synced: true, SentAt: timestamppb.Now()}
	if w.within != 0 {
		m.NextWithin = durationpb.New(w.within)
	}
	if w.policy {
		m.PolicyBundle = &capb.PolicyBundle{Generation: 1}
	}
	return m, nil
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
	const s = time.Second
	for name, tc := range map[string]struct {
		words []word
		want  error
		after time.Duration
	}{
		"never says a word":                    {nil, errSilent, 35 * s},
		"does not say when":                    {[]word{{after: 15 * s}, {after: 15 * s}, {after: 30 * s}}, errSilent, 60*s + 35*s},
		"hangs, with few agents":               {[]word{{0, 9 * s, false}, {9 * s, 9 * s, false}}, errHangs, 9*s + 15*s},
		"hangs, with many agents":              {[]word{{0, 30 * s, false}}, errHangs, 36 * s},
		"is late, but not so late, then hangs": {[]word{{0, 9 * s, false}, {12 * s, 9 * s, false}}, errHangs, 12*s + 15*s},
		"would be silent for a day":            {[]word{{0, 24 * time.Hour, false}}, errHangs, longestWord + 6*s},
		"says what makes no sense":             {[]word{{0, -s, false}}, errSilent, 35 * s},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				st := newStream(slog.New(slog.DiscardHandler))
				st.node = &scriptedNode{words: tc.words}
				err := st.follow(t.Context())
				if !errors.Is(err, tc.want) {
					t.Errorf("error = %v; want %v", err, tc.want)
				}
				if took := time.Since(begun); took != tc.after {
					t.Errorf("given up after %v; want %v", took, tc.after)
				}
			})
		})
	}
}

// One that is late for hours, but answers, is busy: to leave it would make it busier.
func TestCAThatAnswersIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { asksEveryTenSeconds(t, 9*time.Second, func(*Config) {}) })
}

// asksEveryTenSeconds follows a CA that answers, and else says nothing, for an hour.
func asksEveryTenSeconds(t *testing.T, promised time.Duration, set func(*Config)) {
	t.Helper()
	st := newStream(slog.New(slog.DiscardHandler))
	set(&st.cfg)
	node := &scriptedNode{answers: true, within: promised, words: []word{{within: promised}}}
	st.node = node
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour-time.Second)
	defer cancel()
	if err := st.follow(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error = %v; want the stream to go on", err)
	}
	if n := node.asks.Load(); n != 359 {
		t.Errorf("it was asked %d times; want 359", n)
	}
}

// What comes may be long on its way: a message of megabytes, by a link that is slow.
func TestMessageThatIsLongOnItsWayIsNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		st := newStream(slog.New(slog.DiscardHandler))
		st.node = &scriptedNode{words: []word{{within: 9 * time.Second}, {after: 30 * time.Second, within: 9 * time.Second}}}
		go func() {
			for range 7 { // until second 28
				time.Sleep(4 * time.Second)
				st.link.reads.Add(1)
			}
		}()
		if err := st.follow(t.Context()); !errors.Is(err, errHangs) || time.Since(begun) != 45*time.Second {
			t.Errorf("given up after %v: %v; want 45 s, 15 after the second message", time.Since(begun), err)
		}
	})
}

// Something comes for ever, and it is never a message.
func TestBytesWithoutAMessageAreSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		st := newStream(slog.New(slog.DiscardHandler))
		st.node = &scriptedNode{words: []word{{within: 9 * time.Second}}}
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			for ; ctx.Err() == nil; time.Sleep(time.Second) {
				st.link.reads.Add(1)
			}
		}()
		if err := st.follow(ctx); !errors.Is(err, errSilent) || time.Since(begun) != 35*time.Second {
			t.Errorf("given up after %v: %v; want 35 s", time.Since(begun), err)
		}
		cancel()
		time.Sleep(2 * time.Second)
	})
}

func TestTimeThatItTakesToApplyIsNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		st := newStream(slog.New(slog.DiscardHandler))
		st.cfg.OnPolicyBundle = func(*capb.PolicyBundle) { time.Sleep(time.Hour) }
		st.node = &scriptedNode{words: []word{{within: 9 * time.Second, policy: true}}}
		if err := st.follow(t.Context()); !errors.Is(err, errHangs) || time.Since(begun) != time.Hour+15*time.Second {
			t.Errorf("given up after %v: %v", time.Since(begun), err)
		}
	})
}

// An agent whose revocations may not grow old hears of them in time from a CA that speaks
// seldom.
func TestAgentThatHasToHearAsks(t *testing.T) {
	for name, set := range map[string]func(*Config){
		"revocations": func(c *Config) { c.RevocationMaxAge, c.PolicyStaleAfter = 30*time.Second, time.Hour },
		"policy":      func(c *Config) { c.RevocationMaxAge, c.PolicyStaleAfter = time.Hour, 30*time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { asksEveryTenSeconds(t, 40*time.Second, set) })
		})
	}
}

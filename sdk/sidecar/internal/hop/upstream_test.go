// How much is under way to upstreams, and that it is never more than may be.

package hop_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// Whatever is begun and ended in whatever order, no upstream has more than it may, and
// a request is turned away only where each has as much.
func TestUpstreamsAreNeverOverTheirLimit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		most := rapid.IntRange(1, 3).Draw(t, "most")
		var all []*hop.Upstream
		for range rapid.IntRange(1, 4).Draw(t, "upstreams") {
			all = append(all, &hop.Upstream{MaxRequests: most})
		}
		s := hop.NewUpstreams(all...)
		var underWay []*hop.Upstream
		for _, begin := range rapid.SliceOf(rapid.Bool()).Draw(t, "begin or end") {
			if !begin {
				if len(underWay) > 0 {
					underWay[0].Done(false)
					underWay = underWay[1:]
				}
				continue
			}
			u, err := s.Pick()
			switch full := len(underWay) == most*len(all); {
			case full && !errors.Is(err, hop.ErrUpstreamFull):
				t.Fatalf("all are full: %v", err)
			case !full && err != nil:
				t.Fatalf("%d under way of %d: %v", len(underWay), most*len(all), err)
			case !full:
				underWay = append(underWay, u)
			}
		}
		sum := 0
		for _, u := range all {
			if n := int(u.Active()); n > most {
				t.Fatalf("%d under way; at most %d", n, most)
			} else {
				sum += n
			}
		}
		if sum != len(underWay) {
			t.Fatalf("%d are counted, %d under way", sum, len(underWay))
		}
	})
}

// The same, at once from many sides.
func TestLimitsHoldAtOnce(t *testing.T) {
	var now, worst atomic.Int64
	u := &hop.Upstream{MaxRequests: 3, MaxConnections: 3, Dial: func(context.Context) (net.Conn, error) {
		a, b := net.Pipe()
		b.Close()
		return a, nil
	}}
	other := &hop.Upstream{MaxRequests: 3}
	other.Check(errSick, hop.Thresholds{Healthy: 1, Unhealthy: 1})
	s := hop.NewUpstreams(u, other)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 2000 {
				got, err := s.Pick()
				if errors.Is(err, hop.ErrUpstreamFull) {
					continue
				}
				if got != u {
					t.Error("what is too much for the healthy is sent to the ill")
					return
				}
				conn, err := got.Connect(t.Context(), time.Minute)
				if err != nil {
					t.Error(err) // there are no more of them than of requests
					return
				}
				if n := now.Add(1); n > worst.Load() {
					worst.Store(n)
				}
				now.Add(-1)
				conn.Close()
				got.Disconnected()
				got.Done(false)
			}
		})
	}
	all.Wait()
	if worst.Load() > 3 || u.Active() != 0 || u.Connections() != 0 {
		t.Errorf("%d at once, and %d requests and %d connections at the end", worst.Load(), u.Active(), u.Connections())
	}
	if _, err := u.Connect(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	u.Connect(t.Context(), time.Minute)
	u.Connect(t.Context(), time.Minute)
	if _, err := u.Connect(t.Context(), time.Minute); !errors.Is(err, hop.ErrUpstreamFull) {
		t.Errorf("a fourth connection: %v", err)
	}
}

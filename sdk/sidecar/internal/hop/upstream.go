// The upstreams of a hop: the app, or the replicas of a service. Which one gets the
// next request, and whether it is well, is decided here and nowhere else.

package hop

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync/atomic"
	"time"
)

// Upstream is one address that requests go to.
type Upstream struct {
	Address string
	// Dial connects: plainly to an app, by mutual TLS with the one expected peer to a
	// service.
	Dial func(ctx context.Context) (net.Conn, error)
	// MaxRequests, MaxConnections bound what is under way to it; zero: nothing does.
	MaxRequests, MaxConnections int

	conns     atomic.Int64
	active    atomic.Int64 // requests under way
	condition condition
}

// Active is the number of requests under way.
func (u *Upstream) Active() int64 { return u.active.Load() }

// State says whether the upstream gets requests.
func (u *Upstream) State(now time.Time) State { return u.condition.at(now) }

// Check takes in the outcome of a check, nil where it passed, and says whether the
// upstream has become healthy or unhealthy by it.
func (u *Upstream) Check(err error, t Thresholds) (changed bool) {
	return u.condition.check(err, t, time.Now())
}

// Checked is what its checks have found.
func (u *Upstream) Checked() Checked {
	u.condition.mu.Lock()
	defer u.condition.mu.Unlock()
	return u.condition.checked
}

// Upstreams are all of a hop. They are safe for concurrent use.
type Upstreams struct {
	// Budget is of further tries. It does not change.
	Budget Budget

	all    []*Upstream
	budget budget
}

// NewUpstreams are all.
func NewUpstreams(all ...*Upstream) *Upstreams { return &Upstreams{all: all} }

// All gives every upstream; the slice must not be changed.
func (s *Upstreams) All() []*Upstream { return s.all }

// AllUnhealthy says whether checks have found none that is healthy.
func (s *Upstreams) AllUnhealthy() bool {
	return !slices.ContainsFunc(s.all, func(u *Upstream) bool { return !u.condition.unhealthy.Load() })
}

// errNoUpstream is for a hop without any, which the configuration refuses.
var errNoUpstream = errors.New("there is no upstream")

// Pick chooses the upstream of a request: the one with fewer requests under way of
// two that are drawn, of those that are healthy and not in tried. Where none is left
// it takes one that rests, and where all are unhealthy, any: an upstream that is
// really away costs the request no more than being refused here would, and checks that
// ask for the wrong thing must not end a service that works. Done has to follow.
func (s *Upstreams) Pick(tried ...*Upstream) (*Upstream, error) {
	if len(s.all) == 1 && len(tried) == 0 { // an app
		if u := s.all[0]; u.take() {
			return u, nil
		}
		return nil, ErrUpstreamFull
	}
	now := time.Now()
	for worst := range 3 { // Healthy, Resting, Unhealthy
		fits := func(u *Upstream) bool { return u.condition.rank(now) <= worst && !slices.Contains(tried, u) }
		if !slices.ContainsFunc(s.all, fits) {
			continue
		}
		for { // others may be faster
			u := s.draw(func(u *Upstream) bool { return fits(u) && !u.full() })
			if u == nil { // what is too much for the healthy is not for the ill
				return nil, ErrUpstreamFull
			}
			if u.take() {
				return u, nil
			}
		}
	}
	return nil, errNoUpstream
}

// take counts a request, unless there are as many as may be.
func (u *Upstream) take() bool {
	n := u.active.Add(1)
	if u.MaxRequests > 0 && n > int64(u.MaxRequests) {
		u.active.Add(-1)
		return false
	}
	return true
}

func (u *Upstream) full() bool { return u.MaxRequests > 0 && u.active.Load() >= int64(u.MaxRequests) }

// draw gives the less busy of two, or either; nil where fits is true of none.
func (s *Upstreams) draw(fits func(*Upstream) bool) *Upstream {
	var first, second *Upstream
	n := 0
	for _, u := range s.all { // two of n, each pair as likely as any other
		if !fits(u) {
			continue
		}
		n++
		switch {
		case first == nil:
			first = u
		case second == nil:
			second = u
		default:
			if i := rand.IntN(n); i == 0 { //nolint:gosec // which of them gets a request is no secret
				first = u
			} else if i == 1 {
				second = u
			}
		}
	}
	if second == nil {
		return first
	}
	switch a, b := first.active.Load(), second.active.Load(); {
	case a > b, a == b && rand.Uint32()&1 == 0: //nolint:gosec // likewise
		return second
	}
	return first
}

// Done ends what Pick has begun. failed says that the upstream did not answer: it
// could not be connected to, or broke off before its answer began.
func (u *Upstream) Done(failed bool) {
	u.active.Add(-1)
	if failed {
		u.condition.failed(time.Now())
	} else {
		u.condition.answered()
	}
}

// Connect dials within limit. Disconnected has to follow once the connection is closed.
func (u *Upstream) Connect(ctx context.Context, limit time.Duration) (net.Conn, error) {
	if n := u.conns.Add(1); u.MaxConnections > 0 && n > int64(u.MaxConnections) {
		u.conns.Add(-1)
		return nil, ErrUpstreamFull
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := u.Dial(ctx)
	if err != nil {
		u.conns.Add(-1)
		return nil, fmt.Errorf("connect to upstream %s: %w", u.Address, err)
	}
	return conn, nil
}

// Disconnected counts the end of what Connect has given.
func (u *Upstream) Disconnected() { u.conns.Add(-1) }

// Connections is how many there are.
func (u *Upstream) Connections() int64 { return u.conns.Load() }

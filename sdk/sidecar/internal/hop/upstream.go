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

	active   atomic.Int64 // requests under way
	failures atomic.Int64 // in a row
	retryAt  atomic.Int64 // UnixNano; until then others come first
}

// Active is the number of requests under way.
func (u *Upstream) Active() int64 { return u.active.Load() }

// Resting says whether the upstream is left alone because it has failed.
func (u *Upstream) Resting(now time.Time) bool { return u.retryAt.Load() > now.UnixNano() }

// Upstreams are all of a hop. They are safe for concurrent use.
type Upstreams struct {
	all []*Upstream
}

// NewUpstreams are all.
func NewUpstreams(all ...*Upstream) *Upstreams { return &Upstreams{all} }

// All gives every upstream; the slice must not be changed.
func (s *Upstreams) All() []*Upstream { return s.all }

// errNoUpstream is for a hop without any, which the configuration refuses.
var errNoUpstream = errors.New("there is no upstream")

// Pick chooses the upstream of a request: the one with fewer requests under way of
// two that are drawn, of those that are well and not in tried. Where none is left
// it takes one that is not well rather than none. Done has to follow.
func (s *Upstreams) Pick(tried ...*Upstream) (*Upstream, error) {
	if len(s.all) == 1 && len(tried) == 0 { // an app
		s.all[0].active.Add(1)
		return s.all[0], nil
	}
	now := time.Now()
	u := s.draw(func(u *Upstream) bool { return !u.Resting(now) && !slices.Contains(tried, u) })
	if u == nil {
		u = s.draw(func(u *Upstream) bool { return !slices.Contains(tried, u) })
	}
	if u == nil {
		return nil, errNoUpstream
	}
	u.active.Add(1)
	return u, nil
}

// draw gives the less busy of two; nil where fits is true of none.
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
	if second != nil && second.active.Load() < first.active.Load() {
		return second
	}
	return first
}

// How long an upstream rests after a failure: restAfter, doubled with each further
// one, at most restAtMost.
const (
	restAfter  = 250 * time.Millisecond
	restAtMost = 10 * time.Second
)

// Done ends what Pick has begun. failed says that the upstream did not answer: it
// could not be connected to, or broke off before its answer began.
func (u *Upstream) Done(failed bool) {
	u.active.Add(-1)
	if !failed {
		if u.failures.Load() != 0 {
			u.failures.Store(0)
			u.retryAt.Store(0)
		}
		return
	}
	rest := restAtMost
	if n := u.failures.Add(1); n < 7 {
		rest = min(restAfter<<(n-1), restAtMost)
	}
	u.retryAt.Store(time.Now().Add(rest).UnixNano())
}

// Connect dials within limit.
func (u *Upstream) Connect(ctx context.Context, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := u.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to upstream %s: %w", u.Address, err)
	}
	return conn, nil
}

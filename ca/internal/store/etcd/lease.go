package etcd

// Leases. A store has one for each time to live that its campaigns ask for, so
// one as long as they ask for store.CampaignTTL; it is renewed until the store
// closes or etcd could not be reached for so long that it may have run out.

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// minTTL is what etcd makes of less, with its default election timeout.
	minTTL = 2 * time.Second
	// revokeTimeout bounds what Close waits for etcd.
	revokeTimeout = time.Second
)

// leases is safe for concurrent use.
type leases struct {
	mu    sync.Mutex
	byTTL map[time.Duration]*lease // guarded by mu; those that live
}

// lease lives until lost is closed.
type lease struct {
	id   clientv3.LeaseID
	ttl  time.Duration
	lost chan struct{} // closed before etcd can have ended the lease
}

// lease returns a live lease, a new one if there is none.
func (s *Store) lease(ctx context.Context, ttl time.Duration) (*lease, error) {
	ttl = max(ttl.Truncate(time.Second), minTTL)
	s.leases.mu.Lock()
	defer s.leases.mu.Unlock()
	if l := s.leases.byTTL[ttl]; l != nil && !l.isLost() {
		return l, nil
	}
	var asked time.Time
	var res *clientv3.LeaseGrantResponse
	// A lease that was granted without our knowing ends by itself.
	err := s.read(ctx, "take a lease", func(ctx context.Context, c *clientv3.Client) (err error) {
		asked = time.Now()
		res, err = c.Grant(ctx, int64(ttl/time.Second))
		return err
	})
	if err != nil {
		return nil, err
	}
	l := &lease{id: res.ID, ttl: ttl, lost: make(chan struct{})}
	if s.leases.byTTL == nil {
		s.leases.byTTL = make(map[time.Duration]*lease)
	}
	s.leases.byTTL[ttl] = l
	s.running.Go(func() { s.keep(l, asked.Add(l.trusted(res.TTL))) })
	return l, nil
}

func (l *lease) isLost() bool {
	select {
	case <-l.lost:
		return true
	default:
		return false
	}
}

// trusted is how long a lease of so many seconds is relied on: a tenth is for
// clocks that run at different speeds.
func (l *lease) trusted(seconds int64) time.Duration {
	return time.Duration(seconds) * time.Second * 9 / 10
}

// keep renews l until it is lost or the store closes.
func (s *Store) keep(l *lease, until time.Time) {
	ctx, cancel := s.untilClosed(context.Background())
	defer cancel()
	for sleep(ctx, min(l.ttl/4, time.Until(until))) && s.renew(ctx, l, &until) {
	}
	close(l.lost)
	if ctx.Err() != nil {
		return // Close revokes it
	}
	s.leases.forget(l)
	s.log.LogAttrs(ctx, slog.LevelWarn, "lease in etcd lost, and what was led under it", slog.Duration("ttl", l.ttl))
	s.revoke(ctx, l)
}

// renew extends until; false: the lease must no longer be relied on. The time
// runs on the monotonic clock from before the request was sent.
func (s *Store) renew(ctx context.Context, l *lease, until *time.Time) bool {
	ctx, cancel := context.WithDeadline(ctx, *until)
	defer cancel()
	for ctx.Err() == nil {
		var asked time.Time
		var seconds int64
		err := s.read(ctx, "renew the lease", func(ctx context.Context, c *clientv3.Client) (err error) {
			asked = time.Now()
			seconds, err = keepAlive(ctx, c, l.id)
			return err
		})
		switch {
		case err == nil && seconds > 0:
			*until = asked.Add(l.trusted(seconds))
			return true
		case err == nil:
			return false // etcd does not know it
		}
		sleep(ctx, retryDelay)
	}
	return false
}

// keepAlive renews once and returns the seconds left; 0 or less: none.
func keepAlive(ctx context.Context, c *clientv3.Client, id clientv3.LeaseID) (int64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewLeaseClient(c.ActiveConnection()).LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return 0, err
	}
	res, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	return res.TTL, nil
}

// forget makes the next campaign take a new lease.
func (l *leases) forget(gone *lease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byTTL[gone.ttl] == gone {
		delete(l.byTTL, gone.ttl)
	}
}

// revoke ends all leases, so that others lead at once.
func (l *leases) revoke(s *Store) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, lease := range l.byTTL {
		s.revoke(context.Background(), lease)
	}
}

func (s *Store) revoke(ctx context.Context, l *lease) {
	ctx, cancel := context.WithTimeout(ctx, revokeTimeout)
	defer cancel()
	err := s.read(ctx, "revoke the lease", func(ctx context.Context, c *clientv3.Client) error {
		_, err := c.Revoke(ctx, l.id)
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return nil
		}
		return err
	})
	if err != nil {
		s.log.LogAttrs(ctx, slog.LevelInfo, "lease left to run out", slog.Duration("ttl", l.ttl), slog.Any("err", err))
	}
}

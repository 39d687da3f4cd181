package etcd

// Leadership: whoever writes leader/NAME while it does not exist leads, until
// that key goes, with the lease or by resigning. Its ModRevision is the fence.

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
)

const campaignDelay = 250 * time.Millisecond

// Campaign implements store.Store. It waits through times in which etcd cannot
// be reached or takes no writes.
func (s *Store) Campaign(ctx context.Context, name string, ttl time.Duration) (store.Leadership, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	s.leave() // do not hold Close up while waiting
	waiting, cancel := s.untilClosed(ctx)
	defer cancel()
	// Recognizes a key that was written without our being told.
	term := rand.Text()
	for {
		l, err := s.campaign(waiting, name, term, ttl)
		switch {
		case l != nil:
			return l, nil
		case s.isClosed():
			return nil, store.ErrClosed
		case ctx.Err() != nil:
			return nil, fmt.Errorf("campaign for %s: %w", name, ctx.Err())
		case err == nil:
			continue
		case errors.Is(err, store.ErrUnavailable), errors.Is(err, store.ErrReadOnly), errors.Is(err, store.ErrCompacted):
			sleep(waiting, campaignDelay)
		default:
			return nil, fmt.Errorf("campaign for %s: %w", name, err)
		}
	}
}

// campaign tries once, and waits until the one who leads does no longer.
func (s *Store) campaign(ctx context.Context, name, term string, ttl time.Duration) (store.Leadership, error) {
	// The store must not close between taking the lead and watching over it.
	if err := s.enter(); err != nil {
		return nil, err
	}
	held, err := s.lease(ctx, ttl)
	var led *leadership
	var seen int64
	if err == nil {
		led, seen, err = s.take(ctx, name, term, held)
	}
	s.leave()
	switch {
	case err != nil:
		return nil, err
	case led != nil:
		return led, nil
	}
	return nil, s.vacant(ctx, name, seen)
}

// take writes the leader's key if it does not exist; led is nil if somebody
// else leads, as of etcd's revision seen.
func (s *Store) take(ctx context.Context, name, term string, held *lease) (led *leadership, seen int64, err error) {
	key := store.LeaderPrefix + name
	at := s.keys.data(key)
	res, err := s.commitHere(ctx, []clientv3.Cmp{compare(at, 0)},
		[]clientv3.Op{clientv3.OpPut(at, encodeRecord(key, 0, []byte(term)), clientv3.WithLease(held.id))},
		[]clientv3.Op{clientv3.OpGet(at)})
	if errors.Is(err, errLeaseGone) {
		s.leases.forget(held)
		return nil, 0, fmt.Errorf("%w: %v", store.ErrUnavailable, err)
	}
	if err != nil {
		return nil, 0, err
	}
	seen = res.Header.Revision
	fence := seen
	if !res.Succeeded {
		pair := rangeOf(res.Responses[0]).Kvs[0]
		value, _, err := decodeRecord(key, pair.Value)
		if err != nil {
			return nil, 0, err
		}
		if string(value) != term || pair.Lease != int64(held.id) {
			return nil, seen, nil
		}
		fence = pair.ModRevision
	}
	return s.lead(key, fence, held), seen, nil
}

// vacant waits until the leader's key has been deleted after etcd's revision
// seen.
func (s *Store) vacant(ctx context.Context, name string, seen int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	key := store.LeaderPrefix + name
	batches, err := s.Watch(ctx, key, s.layout.revision(seen))
	if err != nil {
		return err
	}
	for b := range batches {
		for _, ev := range b.Events {
			if ev.KV.Key == key && ev.Delete {
				return nil
			}
		}
	}
	return ctx.Err()
}

// lead watches over a leadership that was just won.
func (s *Store) lead(key string, fence int64, held *lease) *leadership {
	l := &leadership{
		store: s, fence: store.Cmp{Key: key, ModRevision: s.layout.revision(fence)},
		lost: make(chan struct{}), resigned: make(chan struct{}),
	}
	s.running.Go(func() {
		select {
		case <-held.lost:
		case <-l.resigned:
		}
		close(l.lost)
	})
	return l
}

type leadership struct {
	store          *Store
	fence          store.Cmp
	lost, resigned chan struct{}
	once           sync.Once
}

// Lost implements store.Leadership.
func (l *leadership) Lost() <-chan struct{} { return l.lost }

// Fence implements store.Leadership.
func (l *leadership) Fence() store.Cmp { return l.fence }

// Resign implements store.Leadership. Lost is closed before the key goes. When
// etcd cannot be reached now, the key goes as soon as it can.
func (l *leadership) Resign(ctx context.Context) (err error) {
	l.once.Do(func() {
		close(l.resigned)
		<-l.lost
		if err = l.vacate(ctx); err == nil || l.store.enter() != nil {
			return // closed: the lease was revoked
		}
		defer l.store.leave()
		l.store.running.Go(func() {
			ctx, cancel := l.store.untilClosed(context.Background())
			defer cancel()
			for l.vacate(ctx) != nil && sleep(ctx, campaignDelay) {
			}
		})
	})
	return err
}

// vacate deletes the leader's key if it is still this leader's.
func (l *leadership) vacate(ctx context.Context) error {
	_, err := l.store.Txn(ctx, []store.Cmp{l.fence}, []store.Op{store.Delete(l.fence.Key)}, nil)
	if errors.Is(err, store.ErrClosed) {
		return nil
	}
	return err
}

// errLeaseGone is etcd's answer to a write under a lease that it does not know.
var errLeaseGone = errors.New("the lease has run out")

package badger

// Leadership. One process has the store open (Badger's directory lock), so who
// leads is settled among its goroutines; each writes its key, which is what
// its fence compares.

import (
	"context"
	"fmt"
	"sync"
	"time"

	"merlon.dev/ca/internal/store"
)

// campaigns holds one slot per name.
type campaigns struct {
	mu    sync.Mutex
	slots map[string]chan struct{} // guarded by mu; full: somebody leads
}

func (c *campaigns) slot(name string) chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.slots == nil {
		c.slots = make(map[string]chan struct{})
	}
	if c.slots[name] == nil {
		c.slots[name] = make(chan struct{}, 1)
	}
	return c.slots[name]
}

// Campaign implements store.Store. The ttl does not matter here: leadership
// ends with the process, and so does the lock on the directory.
func (s *Store) Campaign(ctx context.Context, name string, _ time.Duration) (store.Leadership, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	slot := s.campaigns.slot(name)
	s.leave() // do not hold Close up while waiting
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.stop:
		return nil, store.ErrClosed
	}
	return s.lead(ctx, name, slot)
}

func (s *Store) lead(ctx context.Context, name string, slot chan struct{}) (store.Leadership, error) {
	key := store.LeaderPrefix + name
	res, err := s.Txn(ctx, nil, []store.Op{store.Put(key, nil)}, nil)
	if err != nil {
		<-slot
		return nil, fmt.Errorf("lead %s: %w", name, err)
	}
	if err := s.enter(); err != nil {
		<-slot
		return nil, err
	}
	defer s.leave()
	l := &leadership{fence: store.Cmp{Key: key, ModRevision: res.Revision}, slot: slot, lost: make(chan struct{}), resigned: make(chan struct{})}
	s.running.Go(func() {
		select {
		case <-s.stop:
		case <-l.resigned:
		}
		close(l.lost)
	})
	return l, nil
}

type leadership struct {
	fence          store.Cmp
	slot           chan struct{}
	lost, resigned chan struct{}
	once           sync.Once
}

// Lost implements store.Leadership.
func (l *leadership) Lost() <-chan struct{} { return l.lost }

// Fence implements store.Leadership.
func (l *leadership) Fence() store.Cmp { return l.fence }

// Resign implements store.Leadership. It returns once Lost is closed; then the
// next one leads.
func (l *leadership) Resign(context.Context) error {
	l.once.Do(func() {
		close(l.resigned)
		<-l.lost
		<-l.slot
	})
	return nil
}

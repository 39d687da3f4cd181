// Package etcd keeps the store in an etcd v3 cluster, for CAs of more than one
// replica. Revisions, transactions and watches are etcd's own; the store's
// revision is etcd's plus a base that is fixed when the store is laid out, so
// that one that was imported goes on above its past.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"merlon.dev/ca/internal/store"
)

// Store is safe for concurrent use.
type Store struct {
	cfg     Config
	log     *slog.Logger
	keys    keys
	members *members
	layout  layout
	leases  leases

	stop    chan struct{} // closed by Close
	running sync.WaitGroup

	mu      sync.Mutex
	closed  bool           // guarded by mu
	entered sync.WaitGroup // calls under way; grows under mu only
}

// openTries bounds how long Open waits for etcd, in requests.
const openTries = 3

// Open connects to the store in etcd, laying it out on first use. It waits for
// etcd as long as three requests may take.
func Open(ctx context.Context, cfg Config) (store.Store, error) {
	s, err := open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func open(ctx context.Context, cfg Config) (*Store, error) {
	s, err := connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	l, err := s.openLayout(ctx)
	if err != nil {
		s.disconnect()
		if errors.Is(err, store.ErrUnavailable) {
			// A client certificate that is refused looks like a broken connection.
			return nil, fmt.Errorf("open the store in etcd: %w; check that its members run, and the certificate files", err)
		}
		return nil, fmt.Errorf("open the store in etcd: %w", err)
	}
	s.layout = *l
	s.running.Go(s.compactInTurns)
	return s, nil
}

// connect makes a store that knows nothing yet of what is in etcd.
func connect(ctx context.Context, cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	keys := keys{prefix: cfg.Prefix}
	members, err := newMembers(cfg, keys.layout())
	if err != nil {
		return nil, err
	}
	if err := members.settle(ctx); err != nil {
		members.close()
		return nil, err
	}
	return &Store{cfg: cfg, log: cfg.Logger, keys: keys, members: members, stop: make(chan struct{})}, nil
}

func (s *Store) disconnect() {
	close(s.stop)
	s.members.close()
}

// Close implements store.Store. Watches and campaigns end; what is led passes
// to others at once, where etcd can be reached within a second.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	close(s.stop)
	s.entered.Wait()
	s.running.Wait()
	s.leases.revoke(s)
	s.members.close()
	return nil
}

// enter begins a call that Close waits for.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return store.ErrClosed
	}
	s.entered.Add(1)
	return nil
}

func (s *Store) leave() { s.entered.Done() }

// untilClosed returns a context that ends with the store, too.
func (s *Store) untilClosed(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-s.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

func (s *Store) isClosed() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

// sleep waits; false: ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

package etcd

// One request to etcd: by which member, for how long, and what happens when it
// is not answered. Reads are asked again elsewhere; of writes only those that
// were certainly not carried out.

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	retryDelay    = 20 * time.Millisecond
	maxRetryDelay = 500 * time.Millisecond
	// connectTimeout is how long a request waits for one member's connection.
	connectTimeout = 2 * time.Second
)

type ask func(context.Context, *clientv3.Client) error

// read asks until there is an answer or the time is up.
func (s *Store) read(ctx context.Context, what string, do ask) error {
	return s.request(ctx, what, do, func(err error) bool { return faultOf(err) != permanent })
}

// write asks again only if etcd certainly did nothing.
func (s *Store) write(ctx context.Context, what string, do ask) error {
	return s.request(ctx, what, do, func(err error) bool { return faultOf(err) == notCarried })
}

func (s *Store) request(ctx context.Context, what string, do ask, again func(error) bool) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	limited, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	for delay := retryDelay; ; delay = min(2*delay, maxRetryDelay) {
		m := s.members.pick()
		err := m.ask(limited, do)
		if err == nil {
			return nil
		}
		if faultOf(err) != permanent {
			s.members.leave(m)
		}
		if !again(err) || !sleep(limited, delay) {
			return explain(ctx, what, err)
		}
	}
}

// ask has one member do something, which ends when the member is given up.
func (m *member) ask(ctx context.Context, do ask) error {
	ctx, cancel := m.while(ctx)
	defer cancel()
	connecting, stop := context.WithTimeout(ctx, connectTimeout)
	err := m.connected(connecting)
	stop()
	if err != nil {
		return err
	}
	return do(clientv3.WithRequireLeader(ctx), m.client)
}

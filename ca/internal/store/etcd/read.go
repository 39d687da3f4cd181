package etcd

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
)

// pageKeys bounds the pairs of one request, so that no answer is huge.
const pageKeys = 4096

// Revision implements store.Store.
func (s *Store) Revision(ctx context.Context) (uint64, error) {
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.leave()
	revision, err := s.etcdRevision(ctx)
	return s.layout.revision(revision), err
}

// etcdRevision returns etcd's own latest revision.
func (s *Store) etcdRevision(ctx context.Context) (revision int64, err error) {
	err = s.read(ctx, "read the revision", func(ctx context.Context, c *clientv3.Client) error {
		res, err := c.Get(ctx, s.keys.layout(), clientv3.WithCountOnly())
		if err == nil {
			revision = res.Header.Revision
		}
		return err
	})
	return revision, err
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.KV, uint64, error) {
	if err := s.enter(); err != nil {
		return store.KV{}, 0, err
	}
	defer s.leave()
	var res *clientv3.GetResponse
	err := s.read(ctx, fmt.Sprintf("read %q", key), func(ctx context.Context, c *clientv3.Client) (err error) {
		res, err = c.Get(ctx, s.keys.data(key))
		return err
	})
	if err != nil {
		return store.KV{}, 0, err
	}
	revision := s.layout.revision(res.Header.Revision)
	if len(res.Kvs) == 0 {
		return store.KV{}, revision, store.ErrNotFound
	}
	kv, err := s.keyValue(res.Kvs[0])
	if err != nil {
		return store.KV{}, 0, err
	}
	return kv, revision, nil
}

// List implements store.Store.
func (s *Store) List(ctx context.Context, prefix, after string, limit int, atRevision uint64) ([]store.KV, uint64, bool, error) {
	if limit < 1 {
		return nil, 0, false, errors.New("list with a limit below 1")
	}
	if err := s.enter(); err != nil {
		return nil, 0, false, err
	}
	defer s.leave()
	at := s.layout.native(atRevision)
	if atRevision != 0 && at == 0 {
		return nil, 0, false, fmt.Errorf("list %q at revision %d: %w", prefix, atRevision, store.ErrCompacted)
	}
	kvs, at, more, err := s.list(ctx, prefix, after, limit, at)
	return kvs, s.layout.revision(at), more, err
}

// list reads as many pages as it takes, at one of etcd's revisions.
func (s *Store) list(ctx context.Context, prefix, after string, limit int, at int64) (kvs []store.KV, _ int64, more bool, err error) {
	from, end := s.keys.under(prefix)
	if after >= prefix {
		from = s.keys.data(after + "\x00")
	}
	for {
		var res *clientv3.GetResponse
		size := min(limit-len(kvs), pageKeys)
		err := s.read(ctx, fmt.Sprintf("list %q", prefix), func(ctx context.Context, c *clientv3.Client) (err error) {
			res, err = c.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(int64(size)), clientv3.WithRev(at))
			return err
		})
		if err != nil {
			return nil, 0, false, err
		}
		if at == 0 {
			at = res.Header.Revision
		}
		for _, pair := range res.Kvs {
			kv, err := s.keyValue(pair)
			if err != nil {
				return nil, 0, false, err
			}
			kvs = append(kvs, kv)
		}
		if !res.More || len(kvs) == limit {
			return kvs, at, res.More, nil
		}
		from = string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
	}
}

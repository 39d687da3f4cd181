package etcd

// Reads. All are linearizable, or at a revision that one of those returned.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"merlon.dev/ca/internal/store"
)

// pageKeys bounds the pairs of one request, so that none takes too long.
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
	if at == 0 {
		var err error
		if at, err = s.etcdRevision(ctx); err != nil {
			return nil, 0, false, fmt.Errorf("list %q: %w", prefix, err)
		}
	}
	kvs, more, err := s.list(ctx, prefix, after, limit, at)
	return kvs, s.layout.revision(at), more, err
}

// list reads as many pages as it takes, at one of etcd's revisions.
func (s *Store) list(ctx context.Context, prefix, after string, limit int, at int64) (kvs []store.KV, more bool, err error) {
	from, end := s.keys.under(prefix)
	if after >= prefix {
		from = s.keys.data(after + "\x00")
	}
	for {
		pairs, more, err := s.page(ctx, from, end, min(limit-len(kvs), pageKeys), at)
		if err != nil {
			return nil, false, fmt.Errorf("list %q: %w", prefix, err)
		}
		for _, pair := range pairs {
			kv, err := s.keyValue(pair)
			if err != nil {
				return nil, false, err
			}
			kvs = append(kvs, kv)
		}
		if !more || len(kvs) == limit {
			return kvs, more, nil
		}
		from = string(pairs[len(pairs)-1].Key) + "\x00"
	}
}

// page reads up to limit pairs. It asks for all and stops reading: given a
// limit, etcd counts the keys behind it, which for the pages of a million keys
// takes minutes.
func (s *Store) page(ctx context.Context, from, end string, limit int, at int64) (pairs []*mvccpb.KeyValue, more bool, err error) {
	err = s.read(ctx, "read a page", func(ctx context.Context, c *clientv3.Client) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stream, err := pb.NewKVClient(c.ActiveConnection()).RangeStream(ctx,
			&pb.RangeRequest{Key: []byte(from), RangeEnd: []byte(end), Revision: at}, grpc.MaxCallRecvMsgSize(math.MaxInt32))
		if err != nil {
			return err
		}
		for pairs = nil; len(pairs) <= limit; {
			res, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			pairs = append(pairs, res.RangeResponse.Kvs...)
		}
		return nil
	})
	if len(pairs) > limit {
		return pairs[:limit], true, err
	}
	return pairs, false, err
}

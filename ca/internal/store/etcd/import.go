package etcd

// Import: a new store with the content of another one. m/import marks an
// import under way; each of its writes compares the mark, so that one that was
// broken off, or overtaken by another, writes nothing more.

import (
	"context"
	"errors"
	"fmt"
	"iter"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"merlon.dev/ca/internal/store"
)

// importers is how many batches are under way at once.
const importers = 8

// Import fills an empty store in etcd with pairs, which keep their
// ModRevision; the store goes on above revision at. A store that is there
// already is an error. One that fails leaves what Open refuses and the next
// Import replaces. Each pair is on its own: in any order, no key twice.
func Import(ctx context.Context, cfg Config, at uint64, pairs iter.Seq2[store.KV, error]) error {
	s, err := connect(ctx, cfg)
	if err != nil {
		return err
	}
	defer s.disconnect()
	imp := &importer{store: s, at: at}
	if err := imp.run(ctx, pairs); err != nil {
		return fmt.Errorf("import into etcd: %w", err)
	}
	return nil
}

// importer is for one goroutine.
type importer struct {
	store *Store
	at    uint64
	mark  int64 // etcd's revision of m/import
	seen  uint64
	count int64 // pairs so far
}

func (m *importer) run(ctx context.Context, pairs iter.Seq2[store.KV, error]) error {
	before, err := m.store.readMarks(ctx)
	if err != nil {
		return err
	}
	if err := store.CheckEpoch(m.at, before.seen); err != nil {
		return err
	}
	m.seen = before.seen
	if err := m.begin(ctx); err != nil {
		return err
	}
	if err := m.wipe(ctx); err != nil {
		return err
	}
	if err := m.fill(ctx, pairs); err != nil {
		return err
	}
	return m.finish(ctx)
}

// begin claims the prefix.
func (m *importer) begin(ctx context.Context) error {
	s := m.store
	mark := []clientv3.Op{clientv3.OpPut(s.keys.importing(), "")}
	res, err := s.commit(ctx, s.nothingUnderPrefix(), mark, nil)
	if err == nil && !res.Succeeded {
		// Not empty: fine if it is what an import left.
		claimed := []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(s.keys.importing()), ">", 0)}
		res, err = s.commit(ctx, claimed, mark, nil)
	}
	switch {
	case err != nil:
		return err
	case !res.Succeeded:
		return fmt.Errorf("there are keys under %s already; choose another prefix, or remove them: etcdctl del --prefix %s", s.keys.prefix, s.keys.prefix)
	}
	m.mark = res.Header.Revision
	return nil
}

// write is a transaction of this import, if it is still the one.
func (m *importer) write(ctx context.Context, ops []clientv3.Op) error {
	for {
		res, err := m.store.commit(ctx, []clientv3.Cmp{compare(m.store.keys.importing(), m.mark)}, ops, nil)
		switch {
		case errors.Is(err, store.ErrUnavailable) && ctx.Err() == nil:
			continue // the same again does no harm
		case err != nil:
			return err
		case !res.Succeeded:
			return errors.New("another import has begun")
		}
		return nil
	}
}

// wipe removes what an import before this one left, in steps that etcd can
// take.
func (m *importer) wipe(ctx context.Context) error {
	from, end := m.store.keys.under("")
	for {
		var res *clientv3.GetResponse
		err := m.store.read(ctx, "read what an import left", func(ctx context.Context, c *clientv3.Client) (err error) {
			res, err = c.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageKeys), clientv3.WithKeysOnly())
			return err
		})
		if err != nil || len(res.Kvs) == 0 {
			return err
		}
		upTo := string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
		if err := m.write(ctx, []clientv3.Op{clientv3.OpDelete(from, clientv3.WithRange(upTo))}); err != nil {
			return err
		}
	}
}

func (m *importer) fill(ctx context.Context, pairs iter.Seq2[store.KV, error]) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(importers)
	var batch []clientv3.Op
	bytes := 0
	flush := func() {
		ops := batch
		batch, bytes = nil, 0
		group.Go(func() error { return m.write(ctx, ops) })
	}
	var failed error
	for kv, err := range pairs {
		if failed = m.check(kv, err); failed != nil || ctx.Err() != nil {
			break
		}
		if size := len(kv.Key) + len(kv.Value); len(batch) == store.MaxTxnOps || bytes+size > store.MaxTxnBytes {
			flush()
		}
		bytes += len(kv.Key) + len(kv.Value)
		batch = append(batch, clientv3.OpPut(m.store.keys.data(kv.Key), encodeRecord(kv.Key, kv.ModRevision, kv.Value)))
		m.count++
	}
	if failed == nil && len(batch) > 0 {
		flush()
	}
	return errors.Join(failed, group.Wait())
}

// check refuses pairs that no store can have had.
func (m *importer) check(kv store.KV, err error) error {
	if err != nil {
		return err
	}
	if err := store.CheckTxn(nil, []store.Op{store.Put(kv.Key, kv.Value)}, nil); err != nil {
		return err
	}
	if kv.ModRevision == 0 || kv.ModRevision > m.at {
		return fmt.Errorf("key %q has revision %d, the store it comes from is at %d", kv.Key, kv.ModRevision, m.at)
	}
	return nil
}

// finish lays the store out: from here on it can be opened.
func (m *importer) finish(ctx context.Context) error {
	s := m.store
	from, end := s.keys.under("")
	var res *clientv3.GetResponse
	err := s.read(ctx, "count what was imported", func(ctx context.Context, c *clientv3.Client) (err error) {
		res, err = c.Get(ctx, from, clientv3.WithRange(end), clientv3.WithCountOnly())
		return err
	})
	if err != nil {
		return err
	}
	if res.Count != m.count {
		return fmt.Errorf("%d keys were imported and etcd has %d; was a key named twice?", m.count, res.Count)
	}
	record := layoutRecord{Format: format, Imported: true}
	if etcd := uint64(res.Header.Revision); m.at > etcd {
		record.Base = m.at - etcd // what is written from now on lies above at
	}
	ops, err := s.putLayout(record, m.at, m.seen)
	if err != nil {
		return err
	}
	if err = m.write(ctx, append(ops, clientv3.OpDelete(s.keys.importing()))); err == nil {
		return nil
	}
	if done, _, _ := s.readLayout(ctx); done != nil {
		return nil // carried out the first time, and asked again
	}
	return err
}

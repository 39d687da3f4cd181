package badger

// How transactions become durable. One goroutine takes all that wait, runs
// them in order against a shared overlay, and writes them as one Badger
// transaction with one sync. Only then does any of them learn its outcome:
// also one that wrote nothing may have compared against a neighbour's write.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
)

// A batch must stay below 15 % of the memtable (badgerOptions), data and log
// together, or Badger refuses it.
const (
	maxBatchTxns  = 512
	maxBatchOps   = 4_096
	maxBatchBytes = store.MaxTxnBytes // each is written twice
)

// request is a transaction on its way through the committer.
type request struct {
	ctx             context.Context //nolint:containedctx // a queued call keeps its own deadline
	cmps            []store.Cmp
	then, otherwise []store.Op
	ops, bytes      int // of the larger branch

	result store.TxnResult
	err    error
	done   chan struct{} // closed when result and err are set
}

func newRequest(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) *request {
	r := &request{
		ctx:       ctx,
		cmps:      slices.Clone(cmps),
		then:      cloneOps(then),
		otherwise: cloneOps(otherwise),
		ops:       max(len(then), len(otherwise)),
		done:      make(chan struct{}),
	}
	r.bytes = max(opBytes(then), opBytes(otherwise))
	return r
}

// cloneOps lets the caller reuse its slices when it stops waiting early.
func cloneOps(ops []store.Op) []store.Op {
	own := slices.Clone(ops)
	for i := range own {
		if !own[i].Delete {
			own[i].Value = append([]byte{}, own[i].Value...)
		}
	}
	return own
}

func opBytes(ops []store.Op) (n int) {
	for _, op := range ops {
		n += len(op.Key) + len(op.Value)
	}
	return n
}

// Txn implements store.Store.
func (s *Store) Txn(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) (store.TxnResult, error) {
	if err := store.CheckTxn(cmps, then, otherwise); err != nil {
		return store.TxnResult{}, err
	}
	r := newRequest(ctx, cmps, then, otherwise)
	if err := s.enqueue(ctx, r); err != nil {
		return store.TxnResult{}, err
	}
	select {
	case <-r.done:
		return r.result, r.err
	case <-ctx.Done():
		return store.TxnResult{}, ctx.Err()
	}
}

func (s *Store) enqueue(ctx context.Context, r *request) error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.leave()
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case s.requests <- r:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// commitLoop runs until requests is closed and drained.
func (s *Store) commitLoop() {
	var (
		failed error    // once set, no write is ever acknowledged again
		next   *request // did not fit the last batch
	)
	for {
		var waiting []*request
		if waiting, next = s.gather(next); len(waiting) == 0 {
			return
		}
		refused := failed
		if refused == nil {
			refused = s.room()
		}
		if refused == nil {
			failed = s.commit(waiting)
			refused = failed
		}
		for _, r := range waiting {
			if refused != nil {
				r.result, r.err = store.TxnResult{}, refused
			}
			close(r.done)
		}
	}
}

// gather waits for one request and takes what else is there, up to a batch.
// It returns none when the store is closed.
func (s *Store) gather(first *request) (batch []*request, next *request) {
	if first == nil {
		var open bool
		if first, open = <-s.requests; !open {
			return nil, nil
		}
	}
	// Those that were answered just now get to ask again before the batch is
	// closed; otherwise every second sync would be for one of them alone.
	runtime.Gosched()
	batch = []*request{first}
	ops, size := first.ops, first.bytes
	for len(batch) < maxBatchTxns {
		select {
		case r, open := <-s.requests:
			if !open {
				return batch, nil
			}
			ops, size = ops+r.ops, size+r.bytes
			if ops > maxBatchOps || size > maxBatchBytes {
				return batch, r
			}
			batch = append(batch, r)
		default:
			return batch, nil
		}
	}
	return batch, nil
}

// commit runs a batch and publishes it. An error means that its outcome is
// unknown: what a failed sync left in the page cache may or may not be there
// after a restart, so nothing can be promised from then on.
func (s *Store) commit(waiting []*request) error {
	b := newBatch(s.db, s.history.latest())
	defer b.view.Discard()
	for _, r := range waiting {
		if r.err = r.ctx.Err(); r.err == nil {
			r.result, r.err = b.run(r)
		}
	}
	if len(b.records) == 0 {
		return nil
	}
	compacted, err := s.write(b)
	if err != nil {
		s.log.LogAttrs(context.Background(), slog.LevelError, "store commit failed, writes stop until restart",
			slog.Any("err", err))
		return fmt.Errorf("commit revision %d: %w: %w", b.revision, store.ErrReadOnly, err)
	}
	s.history.publish(b.records, compacted)
	s.db.SetDiscardTs(compacted) // after publish: readers below it must notice
	return nil
}

// batch is the state that the transactions of one commit see.
type batch struct {
	view     *bdg.Txn // the snapshot below the batch
	first    uint64
	revision uint64 // of the last transaction that wrote
	overlay  map[string]state
	records  []record
}

func newBatch(db *bdg.DB, base uint64) *batch {
	return &batch{
		view:     db.NewTransactionAt(base, false),
		first:    base + 1,
		revision: base,
		overlay:  make(map[string]state),
	}
}

// run evaluates one transaction. On an error it has changed nothing.
func (b *batch) run(r *request) (store.TxnResult, error) {
	holds, err := b.compare(r.cmps)
	if err != nil {
		return store.TxnResult{}, err
	}
	ops := r.then
	if !holds {
		ops = r.otherwise
	}
	events, err := b.events(ops)
	if err != nil {
		return store.TxnResult{}, err
	}
	if len(events) > 0 {
		b.apply(events)
	}
	return store.TxnResult{Succeeded: holds, Revision: b.revision}, nil
}

func (b *batch) compare(cmps []store.Cmp) (bool, error) {
	for _, c := range cmps {
		now, err := b.lookup(c.Key)
		if err != nil || now.revision != c.ModRevision {
			return false, err
		}
	}
	return true, nil
}

func (b *batch) lookup(key string) (state, error) {
	if st, ok := b.overlay[key]; ok {
		return st, nil
	}
	return readState(b.view, key)
}

// events turns writes into what they change at the next revision.
func (b *batch) events(ops []store.Op) ([]store.Event, error) {
	events := make([]store.Event, 0, len(ops))
	for _, op := range ops {
		before, err := b.lookup(op.Key)
		if err != nil {
			return nil, err
		}
		if op.Delete && before.revision == 0 {
			continue
		}
		e := store.Event{Delete: op.Delete, Prev: before.value}
		e.KV = store.KV{Key: op.Key, ModRevision: b.revision + 1}
		if !op.Delete {
			e.KV.Value = op.Value
		}
		events = append(events, e)
	}
	return events, nil
}

func (b *batch) apply(events []store.Event) {
	b.revision++
	for _, e := range events {
		var st state
		if !e.Delete {
			st = state{value: e.KV.Value, revision: b.revision}
		}
		b.overlay[e.KV.Key] = st
	}
	b.records = append(b.records, record{revision: b.revision, first: b.first, events: events})
}

// write commits the batch, with a step of compaction, and returns the new
// compaction point.
func (s *Store) write(b *batch) (compacted uint64, err error) {
	txn := s.db.NewTransactionAt(b.first-1, true)
	defer txn.Discard()
	for key, st := range b.overlay {
		if st.revision == 0 {
			err = txn.Delete(dataKey(key))
		} else {
			err = txn.Set(dataKey(key), encodeValue(st))
		}
		if err != nil {
			return 0, err
		}
	}
	for i := range b.records {
		if err := txn.Set(logKey(b.records[i].revision), b.records[i].encode()); err != nil {
			return 0, err
		}
	}
	if compacted, err = s.compact(txn, b); err != nil {
		return 0, err
	}
	return compacted, s.commitAt(txn, b.revision)
}

// compact adds the removal of records beyond KeepRevisions to a commit: the
// work is bounded, needs no sync of its own, and costs in proportion to what
// is written. The compaction point is always the end of a batch, since the
// values before a batch are read from the snapshot below it.
func (s *Store) compact(txn *bdg.Txn, b *batch) (uint64, error) {
	from := s.history.compactedTo()
	if b.revision <= from+s.opts.KeepRevisions {
		return from, nil
	}
	// Twice a full batch: there is the end of a batch in it, and a log that
	// has grown too long (KeepRevisions was lowered) shrinks.
	to := min(b.revision-s.opts.KeepRevisions, from+2*maxBatchTxns, b.first-1)
	if to < b.first-1 {
		next, err := readRecord(b.view, to+1)
		if err != nil {
			return 0, err
		}
		to = next.first - 1
	}
	if to <= from {
		return from, nil
	}
	for revision := from + 1; revision <= to; revision++ {
		if err := txn.Delete(logKey(revision)); err != nil {
			return 0, err
		}
	}
	return to, txn.Set(compactedKey, binary.BigEndian.AppendUint64(nil, to))
}

// readRecord returns one record without the values before.
func readRecord(view *bdg.Txn, revision uint64) (r record, err error) {
	item, err := view.Get(logKey(revision))
	if errors.Is(err, bdg.ErrKeyNotFound) {
		return record{}, fmt.Errorf("revision log: record %d is missing", revision)
	}
	if err != nil {
		return record{}, fmt.Errorf("revision log: record %d: %w", revision, err)
	}
	err = item.Value(func(b []byte) error {
		r, err = decodeRecord(revision, b)
		return err
	})
	return r, err
}

// cloneEvent gives a receiver its own bytes.
func cloneEvent(e store.Event) store.Event {
	e.KV.Value, e.Prev = bytes.Clone(e.KV.Value), bytes.Clone(e.Prev)
	return e
}

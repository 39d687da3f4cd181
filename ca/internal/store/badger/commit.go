package badger

// How transactions become durable. One goroutine, the committer, takes all that
// wait, runs them in order against a shared overlay, and writes them as one
// Badger transaction with one sync. A second one (publish.go) then syncs the
// head, while the committer is busy with the next batch, on top of what nobody
// else sees yet. Only then does any of them learn its outcome: also one that
// wrote nothing may have compared against a neighbour's write.

import (
	"bytes"
	"context"
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
	// maxCommitted batches wait for the head at most; the committer waits then.
	maxCommitted = 4
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
	defer close(s.committed)
	var next *request // did not fit the last batch
	for {
		var waiting []*request
		if waiting, next = s.gather(next); len(waiting) == 0 {
			return
		}
		done := committed{requests: waiting}
		if done.refused = s.refusal(); done.refused == nil {
			s.commit(&done)
		}
		s.committed <- done
	}
}

// refusal says why nothing may be written now.
func (s *Store) refusal() error {
	if failed := s.failed.Load(); failed != nil {
		return *failed
	}
	return s.room()
}

// stopWrites ends all writes for good: once a sync has failed, what it left in the
// page cache may or may not be there after a restart, so nothing can be
// promised from then on.
func (s *Store) stopWrites(revision uint64, cause error) {
	err := fmt.Errorf("commit revision %d: %w: %w", revision, store.ErrReadOnly, cause)
	if s.failed.CompareAndSwap(nil, &err) {
		s.log.LogAttrs(context.Background(), slog.LevelError, "store commit failed, writes stop until restart",
			slog.Any("err", cause))
	}
}

// uncertain is what those are told whose own write a failed sync has hit.
func uncertain(failed error) error { return fmt.Errorf("%w; %w", store.ErrUncertain, failed) }

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

// committed is what the committer hands on: transactions that have run, and
// what they have written to Badger, which is synced but not yet acknowledged.
type committed struct {
	requests  []*request
	refused   error    // nothing may be acknowledged
	records   []record // none: nothing was written
	tip       point    // after them
	compacted uint64   // the compaction point
}

// commit runs a batch and writes it to Badger.
func (s *Store) commit(done *committed) {
	b := newBatch(s.db, s.tip.revision)
	defer b.view.Discard()
	for _, r := range done.requests {
		if r.err = r.ctx.Err(); r.err == nil {
			r.result, r.err = b.run(r)
		}
	}
	if len(b.records) == 0 {
		return
	}
	if err := s.write(b); err != nil {
		s.stopWrites(b.revision, err)
		done.refused = uncertain(*s.failed.Load())
		return
	}
	done.records, done.tip, done.compacted = b.records, s.tip, s.compacted.revision
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
	if err := b.apply(ops); err != nil {
		return store.TxnResult{}, err
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

// apply makes one record of the writes, unless they change nothing.
func (b *batch) apply(ops []store.Op) error {
	r := record{revision: b.revision + 1, first: b.first, events: make([]store.Event, 0, len(ops))}
	states := make([]state, 0, len(ops)) // after each event
	for _, op := range ops {
		before, err := b.lookup(op.Key)
		if err != nil {
			return err
		}
		if op.Delete && before.revision == 0 {
			continue
		}
		e := store.Event{Delete: op.Delete, Prev: before.value}
		e.KV = store.KV{Key: op.Key, ModRevision: r.revision}
		var after state
		if !op.Delete {
			after = newState(op.Key, op.Value, r.revision)
			e.KV.Value = after.value
		}
		r.events, states = append(r.events, e), append(states, after)
		r.change.replace(before, after)
	}
	if len(r.events) == 0 {
		return nil
	}
	for i, e := range r.events {
		b.overlay[e.KV.Key] = states[i]
	}
	b.revision = r.revision
	b.records = append(b.records, r)
	return nil
}

// write commits the batch, with a step of compaction, and moves tip and
// compacted on. On an error the outcome is unknown.
func (s *Store) write(b *batch) error {
	txn := s.db.NewTransactionAt(b.first-1, true)
	defer txn.Discard()
	for key, st := range b.overlay {
		var err error
		if st.revision == 0 {
			err = txn.Delete(dataKey(key))
		} else {
			err = txn.Set(dataKey(key), st.stored)
		}
		if err != nil {
			return err
		}
	}
	tip := s.tip
	for i := range b.records {
		r := &b.records[i]
		r.last = b.revision
		encoded := r.encode()
		tip = tip.next(r.revision, encoded, r.change)
		if err := txn.Set(logKey(r.revision), tip.appendLink(encoded)); err != nil {
			return err
		}
	}
	compacted, err := s.compact(txn, b)
	if err != nil {
		return err
	}
	if err := s.commitAt(txn, b.revision); err != nil {
		return err
	}
	s.tip, s.compacted = tip, compacted
	return nil
}

// compact adds the removal of records beyond KeepRevisions to a commit: the
// work is bounded, needs no sync of its own, and costs in proportion to what
// is written. The compaction point is always the end of a batch, since the
// values before a batch are read from the snapshot below it.
func (s *Store) compact(txn *bdg.Txn, b *batch) (point, error) {
	from := s.compacted
	if b.revision <= from.revision+s.opts.KeepRevisions {
		return from, nil
	}
	// Twice a full batch: there is the end of a batch in it, and a log that
	// has grown too long (KeepRevisions was lowered) shrinks. Nothing above the
	// head: it must find its own point in the log.
	to := min(b.revision-s.opts.KeepRevisions, from.revision+2*maxBatchTxns, s.history.latest())
	if to <= from.revision {
		return from, nil
	}
	r, point, err := readRecord(b.view, to)
	if err == nil && r.last != to {
		if to = r.first - 1; to <= from.revision {
			return from, nil
		}
		_, point, err = readRecord(b.view, to)
	}
	if err != nil {
		return from, err
	}
	for revision := from.revision + 1; revision <= to; revision++ {
		if err := txn.Delete(logKey(revision)); err != nil {
			return from, err
		}
	}
	return point, txn.Set(compactedKey, encodeCompacted(point))
}

// cloneEvent gives a receiver its own bytes.
func cloneEvent(e store.Event) store.Event {
	e.KV.Value, e.Prev = bytes.Clone(e.KV.Value), bytes.Clone(e.Prev)
	return e
}

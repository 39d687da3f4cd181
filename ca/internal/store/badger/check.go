package badger

// What must hold before a store is used: the chain over all records that are
// kept, the data as the last of them left it, and the head.

import (
	"errors"
	"fmt"
	"math"

	bdg "github.com/dgraph-io/badger/v4"
)

// inspection is what was found in a store.
type inspection struct {
	head    headSlot
	headErr error // there is none

	compacted point  // records above it are kept
	tip       point  // the last one up to which the log is whole
	highest   uint64 // revision that anything in the store names

	reason      string // why the store is damaged; empty if it is not
	first, last uint64 // what is missing, as in DamagedError
	noData      bool   // the data is damaged, or cannot be compared with the log
}

// damage is what Open returns for this, nil if there is none.
func (f *inspection) damage(dir string) error {
	if f.reason == "" {
		return nil
	}
	e := &DamagedError{Dir: dir, Reason: f.reason, First: f.first, Last: f.last}
	if !f.noData {
		e.LastGood = f.tip.revision
	}
	if e.First == 0 {
		e.Last = f.head.tip.revision
	}
	return e
}

// inspect looks at a store. An error means that it is none that this version
// knows, or that it cannot be read; what is damaged is in the inspection.
func inspect(db *bdg.DB, head headSlot, headErr error) (*inspection, error) {
	f := &inspection{head: head, headErr: headErr, highest: max(head.tip.revision, db.MaxVersion())}
	view := db.NewTransactionAt(math.MaxUint64, false)
	defer view.Discard()
	if db.MaxVersion() == 0 {
		f.empty()
		return f, nil
	}
	err := checkFormat(view)
	if errors.Is(err, errNoFormat) && head.tip.revision > 0 {
		f.empty()
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	if f.compacted, err = readCompacted(view); err != nil {
		f.reason, f.noData = err.Error(), true
		return f, nil
	}
	f.walkLog(view)
	f.compareHead()
	if f.reason == "" && db.MaxVersion() != f.tip.revision {
		f.reason = fmt.Sprintf("data of revision %d, but the revision log ends at %d", db.MaxVersion(), f.tip.revision)
		f.noData = true
	}
	f.checkData(db)
	return f, nil
}

// empty judges a database without content: a new store, whose head says that it
// is being laid out, or nothing that is left of an old one.
func (f *inspection) empty() {
	switch {
	case f.headErr != nil:
		f.reason = f.headErr.Error()
	case f.head.tip.revision > 0:
		f.reason = "nothing of it is left"
		f.first, f.last = 1, f.head.tip.revision
	}
	f.noData = true
}

var errNoFormat = errors.New("a Badger database, but not a Merlon store")

func checkFormat(view *bdg.Txn) error {
	found, err := readMeta(view, formatKey)
	switch {
	case errors.Is(err, bdg.ErrKeyNotFound):
		return errNoFormat
	case err != nil:
		return fmt.Errorf("read format version: %w", err)
	case string(found) == "1":
		return fmt.Errorf("format version 1, from before the first release, is not read any more; this merlon-ca writes %s: begin with an empty data_dir", format)
	case string(found) != format:
		return fmt.Errorf("format version %q, but this merlon-ca knows only %q: a newer one wrote it", found, format)
	}
	return nil
}

// walkLog follows the chain from the compaction point. It moves tip to the end
// of the last batch that is whole.
func (f *inspection) walkLog(view *bdg.Txn) {
	f.tip = f.compacted
	it := under(view, logPrefix)
	defer it.Close()
	walk := chainWalk{at: f.compacted, batchEnd: f.compacted.revision, head: f.head.tip}
	walk.meet()
	for it.Seek(logKey(f.compacted.revision + 1)); it.Valid(); it.Next() {
		revision, err := revisionOfLogKey(it.Item().Key())
		if err == nil {
			err = it.Item().Value(func(b []byte) error { return walk.step(revision, b) })
		}
		if err != nil {
			f.broken(revision, err)
			break
		}
		f.highest = max(f.highest, revision)
		if walk.batchEnd == revision {
			f.tip = walk.at
		}
	}
	if f.reason == "" && walk.batchEnd > walk.at.revision {
		f.broken(walk.batchEnd, fmt.Errorf("the revision log ends at %d, within a batch", walk.at.revision))
	}
	if f.reason == "" && walk.differs {
		f.reason = fmt.Sprintf("head and revision log have different histories at revision %d", f.head.tip.revision)
		f.first = f.tip.revision + 1
	}
}

// broken notes where the log ends before its time; revision is the first that
// is there again, or is not as it should be.
func (f *inspection) broken(revision uint64, err error) {
	f.reason = err.Error()
	f.highest = max(f.highest, revision)
	f.first = f.tip.revision + 1
	f.last = max(f.first, f.highest)
}

// chainWalk is a walk over records in order.
type chainWalk struct {
	at       point  // after the last record
	first    uint64 // of its batch
	batchEnd uint64 // of its batch
	head     point  // what to compare with on the way
	differs  bool   // the head's point was met, and was another one
}

// step takes the next record. An error says that it is not the next one.
func (w *chainWalk) step(revision uint64, b []byte) error {
	want := w.at.revision + 1
	if revision != want {
		return fmt.Errorf("the revision log goes on at %d after %d", revision, w.at.revision)
	}
	encoded, after, err := splitRecord(revision, b)
	if err != nil {
		return err
	}
	if !after.follows(w.at, encoded) {
		return fmt.Errorf("record %d does not continue the hash chain", revision)
	}
	first, last, err := recordBatch(revision, encoded)
	if err != nil {
		return err
	}
	if begins := w.at.revision == w.batchEnd; begins != (first == revision) || !begins && (first != w.first || last != w.batchEnd) {
		return fmt.Errorf("record %d is of another batch than its neighbours", revision)
	}
	w.at, w.first, w.batchEnd = after, first, last
	w.meet()
	return nil
}

// meet compares the head with the point that has been reached. A head at 0 says
// nothing.
func (w *chainWalk) meet() {
	if w.head.revision != 0 && w.at.revision == w.head.revision && w.at != w.head {
		w.differs = true
	}
}

// compareHead makes sure that all that was acknowledged is there. What lies
// above the head was written, but not acknowledged: it is kept.
func (f *inspection) compareHead() {
	acknowledged := f.head.tip.revision
	switch {
	case f.headErr != nil && f.reason == "":
		f.reason, f.first = f.headErr.Error(), f.tip.revision+1
	case f.headErr != nil:
		f.last = 0
	case acknowledged > f.tip.revision:
		if f.reason == "" {
			f.reason = fmt.Sprintf("revision %d was acknowledged, but the revision log ends at %d", acknowledged, f.tip.revision)
		}
		f.first, f.last = f.tip.revision+1, max(acknowledged, f.highest)
	case acknowledged < f.compacted.revision && acknowledged > 0 && f.reason == "":
		f.reason = fmt.Sprintf("the head is at revision %d, below all that is kept (%d): it belongs to another store", acknowledged, f.compacted.revision+1)
		f.first = f.tip.revision + 1
	}
}

// checkData reads every value as it was at tip: each has its own checksum, and
// together they have the sum that the log says. Data that does not is worse
// than a log that ends too early.
func (f *inspection) checkData(db *bdg.DB) {
	sum, err := sumData(db, f.tip.revision)
	if err == nil && (sum.keys != f.tip.keys || sum.sum != f.tip.sum) {
		err = fmt.Errorf("%d keys are there at revision %d, and %d should be", sum.keys, f.tip.revision, f.tip.keys)
		if sum.keys == f.tip.keys {
			err = fmt.Errorf("the data at revision %d is not what the revision log says", f.tip.revision)
		}
	}
	if err != nil {
		f.fault(err)
	}
}

// fault notes that the data is not what it should be.
func (f *inspection) fault(err error) {
	if f.reason != "" {
		f.reason += "; "
	} else {
		f.first, f.last = 0, 0
	}
	f.reason += err.Error()
	f.noData = true
}

// sumData adds up all values at a revision.
func sumData(db *bdg.DB, revision uint64) (c change, err error) {
	view := db.NewTransactionAt(revision, false)
	defer view.Discard()
	it := under(view, dataPrefix)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		item := it.Item()
		err := item.Value(func(b []byte) error {
			st, err := decodeValue(item.Key(), b)
			if err == nil && st.revision > revision {
				err = fmt.Errorf("key %q is of revision %d", trimDataPrefix(item.Key()), st.revision)
			}
			c.replace(state{}, st)
			return err
		})
		if err != nil {
			return change{}, err
		}
	}
	return c, nil
}

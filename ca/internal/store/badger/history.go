package badger

// What watchers follow: the published revision, the latest records in memory,
// and older ones from the revision log. A commit never waits for a watcher; it
// only replaces a channel that sleepers wait on.

import (
	"fmt"
	"slices"
	"sync"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
)

const (
	maxRecentBytes = 8 << 20
	// A watcher takes at most so much in one step, from memory or disk.
	maxStepRecords = 256
	maxStepBytes   = 4 << 20
)

// history is safe for concurrent use. Records in it are never changed.
type history struct {
	keep int // records in memory

	// mu guards what follows.
	mu          sync.RWMutex
	revision    uint64        // published: durable and visible
	compacted   uint64        // records up to here are gone
	recent      []record      // the last ones, without gaps, ending at revision
	recentBytes int           // their sizes
	changed     chan struct{} // closed when revision rises
}

func (h *history) init(revision, compacted uint64, keep int) {
	h.revision, h.compacted, h.keep = revision, compacted, keep
	h.changed = make(chan struct{})
}

func (h *history) latest() uint64 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.revision
}

func (h *history) compactedTo() uint64 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.compacted
}

// publish makes a durable batch visible.
func (h *history) publish(records []record, compacted uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range records {
		h.recentBytes += records[i].size()
	}
	h.recent = append(h.recent, records...)
	var drop int
	for ; len(h.recent)-drop > h.keep || h.recentBytes > maxRecentBytes; drop++ {
		h.recentBytes -= h.recent[drop].size()
		h.recent[drop] = record{}
	}
	h.recent = h.recent[drop:]
	h.revision = records[len(records)-1].revision
	h.compacted = compacted
	close(h.changed)
	h.changed = make(chan struct{})
}

// resumable tells whether the changes right after revision are kept.
func (h *history) resumable(revision uint64) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	switch {
	case revision < h.compacted:
		return fmt.Errorf("revision %d, kept above %d: %w", revision, h.compacted, store.ErrCompacted)
	case revision > h.revision:
		return fmt.Errorf("revision %d, but the store is at %d: %w", revision, h.revision, store.ErrCompacted)
	}
	return nil
}

// after returns the next records above revision if memory has them. If not,
// onDisk says where to look: in the log, or nowhere before changed is closed.
func (h *history) after(revision uint64) (records []record, onDisk bool, changed <-chan struct{}) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if revision >= h.revision {
		return nil, false, h.changed
	}
	if len(h.recent) == 0 || h.recent[0].revision > revision+1 {
		return nil, true, nil
	}
	start := int(revision + 1 - h.recent[0].revision)
	end := min(start+maxStepRecords, len(h.recent))
	return slices.Clone(h.recent[start:end]), false, nil
}

// readLog returns records above revision from disk, up to a step.
func (s *Store) readLog(revision uint64) ([]record, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.leave()
	if err := s.history.resumable(revision); err != nil {
		return nil, err
	}
	records, err := readRecords(s.db, revision, s.history.latest())
	// Was it compacted while we read? Then a gap is no damage.
	if err := s.history.resumable(revision); err != nil {
		return nil, err
	}
	return records, err
}

// readRecords reads records above revision up to last, with the values before.
// It starts with the whole batch, for these may stem from it. A record that does
// not go on from the one before has rotted since the store was opened.
func readRecords(db *bdg.DB, revision, last uint64) ([]record, error) {
	view := db.NewTransactionAt(last, false)
	defer view.Discard()
	next, _, err := readRecord(view, revision+1)
	if err != nil {
		return nil, err
	}
	before, err := pointAt(view, next.first-1)
	if err != nil {
		return nil, err
	}
	var (
		records []record
		size    int
		prev    = previous{db: db}
	)
	defer prev.close()
	for at := next.first; at <= last && len(records) < maxStepRecords && size < maxStepBytes; at++ {
		r, after, err := readRecord(view, at)
		if err != nil {
			return nil, err
		}
		if !after.follows(before, r.encode()) {
			return nil, fmt.Errorf("revision log: record %d: %w: it does not continue the hash chain", at, store.ErrDamaged)
		}
		before = after
		if err := prev.fill(&r); err != nil {
			return nil, err
		}
		if at > revision {
			records = append(records, r)
			size += r.size()
		}
	}
	return records, nil
}

// pointAt returns the point after a revision whose record is kept, or that is
// the last one whose record is not.
func pointAt(view *bdg.Txn, revision uint64) (point, error) {
	compacted, err := readCompacted(view)
	if err != nil || compacted.revision == revision {
		return compacted, err
	}
	_, after, err := readRecord(view, revision)
	return after, err
}

// previous finds the values before each event of records read in order.
type previous struct {
	db      *bdg.DB
	view    *bdg.Txn // the snapshot below the batch
	first   uint64   // of the batch
	overlay map[string][]byte
}

func (p *previous) fill(r *record) error {
	if p.view == nil || p.first != r.first {
		p.close()
		p.view, p.first = p.db.NewTransactionAt(r.first-1, false), r.first
		p.overlay = make(map[string][]byte)
	}
	for i := range r.events {
		e := &r.events[i]
		if err := p.fillEvent(e); err != nil {
			return err
		}
		p.overlay[e.KV.Key] = e.KV.Value // nil after a delete, which has no Prev to follow
	}
	return nil
}

func (p *previous) fillEvent(e *store.Event) error {
	if e.Prev == nil {
		return nil
	}
	if value, ok := p.overlay[e.KV.Key]; ok {
		e.Prev = value
		return nil
	}
	st, err := readState(p.view, e.KV.Key)
	if err != nil {
		return err
	}
	if st.revision == 0 {
		return fmt.Errorf("revision log: the value of %q before revision %d is missing", e.KV.Key, e.KV.ModRevision)
	}
	e.Prev = st.value
	return nil
}

func (p *previous) close() {
	if p.view != nil {
		p.view.Discard()
		p.view = nil
	}
}

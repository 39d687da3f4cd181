package badger

// Looking at a store without opening it.

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	bdg "github.com/dgraph-io/badger/v4"

	"merlon.dev/ca/internal/store"
)

// Report is what Verify found.
type Report struct {
	// Compacted is the revision up to which changes are no longer kept one by
	// one, Revision the last one up to which the revision log is whole.
	Compacted, Revision uint64
	// Acknowledged is the revision in the head; 0 if there is none. What lies
	// above it was written, but its writers were not told so.
	Acknowledged uint64
	// Clean is true if the store was closed after its last write.
	Clean bool
	// Keys and Bytes are those of the data at Revision; Bytes counts keys and
	// values.
	Keys, Bytes uint64
	// Damage says what is wrong; nil if nothing is.
	Damage *DamagedError
}

// Verify inspects the store in dir: the hash chain over the revision log, every
// value, the log against the data, and the head. It changes nothing, but needs
// room in dir for a copy of Badger's logs. A store that a CA has open is
// refused. The error is for what could not be inspected; damage is in the
// report.
func Verify(dir string) (Report, error) {
	r, err := verify(dir)
	if err != nil {
		return Report{}, fmt.Errorf("verify store %s: %w", dir, err)
	}
	return r, nil
}

func verify(dir string) (r Report, err error) {
	lock, err := lockDir(dir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, lock.dir.Close()) }()
	for _, name := range []string{clearingName, movingName} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return r, errors.New("an import was broken off; merlon-ca finishes it when it starts")
		}
	}
	if there, err := Exists(dir); err != nil || !there {
		return r, cmp.Or(err, store.ErrNone)
	}
	head, headErr := readHead(dir)
	if headErr != nil && !errors.Is(headErr, errNoHead) {
		return r, headErr
	}
	begun, err := hasBadger(dir)
	if err != nil {
		return r, err
	}
	f := &inspection{head: head, headErr: headErr}
	if begun {
		opts := badgerOptions(dir, slog.New(slog.DiscardHandler))
		f, err = examineCopy(dir, opts, head, headErr, r.count)
	} else {
		f.empty()
		err = f.damage(dir)
	}
	if damaged, ok := errors.AsType[*DamagedError](err); ok {
		r.Damage, err = damaged, nil
	}
	if f != nil {
		r.Compacted, r.Revision = f.compacted.revision, f.tip.revision
		r.Acknowledged, r.Clean = head.tip.revision, head.clean
	}
	return r, err
}

// count reads all data once more, and holds it against the log.
func (r *Report) count(db *bdg.DB, f *inspection) error {
	for kv, err := range snapshot(db, f.tip.revision) {
		if err != nil {
			break // it is in the inspection
		}
		r.Keys++
		r.Bytes += uint64(len(kv.Key) + len(kv.Value))
	}
	if err := compareLog(db, f); err != nil {
		f.fault(err)
	}
	return nil
}

// compareLog holds the data against the last record of each key.
func compareLog(db *bdg.DB, f *inspection) error {
	view := db.NewTransactionAt(f.tip.revision, false)
	defer view.Discard()
	seen := make(map[string]bool)
	for revision := f.tip.revision; revision > f.compacted.revision; revision-- {
		r, _, err := readRecord(view, revision)
		if err != nil {
			return err
		}
		for _, e := range r.events {
			if seen[e.KV.Key] {
				continue
			}
			seen[e.KV.Key] = true
			st, err := readState(view, e.KV.Key)
			if err != nil {
				return err
			}
			if e.Delete != (st.revision == 0) || !e.Delete && (st.revision != revision || string(st.value) != string(e.KV.Value)) {
				return fmt.Errorf("key %q is of revision %d, and its last record is %d", e.KV.Key, st.revision, revision)
			}
		}
	}
	return nil
}

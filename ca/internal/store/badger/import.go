package badger

// Import: a new store with the content of another one. It is built in a folder
// inside the store's own and then moved up, in steps that Open finishes where
// they were broken off.

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"time"

	bdg "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/ristretto/v2/z"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/durable"
)

// Folders of an import, in order. What is in the first is not complete, what is
// in the second is not yet wanted; from the third on there is no way back.
const (
	partialName  = "incoming-partial"
	incomingName = "incoming"
	clearingName = "installing-1" // what is in the way is moved aside
	movingName   = "installing-2" // what has come in is moved up
	// damagedName begins the folder for what was in the way.
	damagedName = "damaged-"
)

// Exists tells whether there is a store in dir, or what is left of one. Where
// there is none, but an import was broken off before it was one, the error is
// store.ErrUnfinished. A folder that is there for other reasons, such as
// lost+found, is neither.
func Exists(dir string) (bool, error) {
	begun, err := hasBadger(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || begun || hasAny(dir, headName, clearingName, movingName) {
		return err == nil, err
	}
	if hasAny(dir, partialName, incomingName) {
		return false, store.ErrUnfinished
	}
	return false, nil
}

func hasAny(dir string, names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		_, err := os.Lstat(filepath.Join(dir, name))
		return err == nil
	})
}

// dropStaged removes what was being staged and is not wanted.
func dropStaged(dir string) error {
	return errors.Join(os.RemoveAll(filepath.Join(dir, partialName)), os.RemoveAll(filepath.Join(dir, incomingName)))
}

// Import makes a new store in dir and fills it with pairs, which come in order
// of their keys and keep their ModRevision; the store goes on above revision
// at, which is at least the highest of them. A directory that holds a store
// already is an error, and an import that fails leaves none; what one left that
// was broken off is removed.
func Import(dir string, opts Options, at uint64, pairs iter.Seq2[store.KV, error]) error {
	if at == 0 {
		return errors.New("import at revision 0: a store begins at 1")
	}
	if err := makePrivate(dir); err != nil {
		return fmt.Errorf("import: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return fmt.Errorf("import into %s: %w", dir, err)
	}
	lock.sign()
	if err := errors.Join(importGuarded(dir, opts.withDefaults(), at, pairs), lock.release()); err != nil {
		return fmt.Errorf("import into %s: %w", dir, err)
	}
	return nil
}

func importGuarded(dir string, opts Options, at uint64, pairs iter.Seq2[store.KV, error]) error {
	guard, err := newGuard(dir, opts.ReserveBytes, opts.Logger)
	if err != nil {
		return err
	}
	guard.watch()
	defer guard.unwatch()
	return importLocked(dir, opts, at, pairs)
}

func importLocked(dir string, opts Options, at uint64, pairs iter.Seq2[store.KV, error]) error {
	if err := finishInstall(dir); err != nil {
		return err
	}
	if there, err := Exists(dir); err != nil && !errors.Is(err, store.ErrUnfinished) {
		return err
	} else if there {
		return errors.New("there is a store already; it takes a new folder")
	}
	if err := stage(dir, opts, at, pairs); err != nil {
		return err
	}
	return install(dir)
}

// stage builds a whole store in the folder incomingName, whose guard watches.
func stage(dir string, opts Options, at uint64, pairs iter.Seq2[store.KV, error]) (err error) {
	partial, incoming := filepath.Join(dir, partialName), filepath.Join(dir, incomingName)
	if err := dropStaged(dir); err != nil {
		return err
	}
	room, err := newRoom(dir, opts)
	if err != nil {
		return err
	}
	if err := room.check(opts.ImportBytes + walBytes); err != nil {
		return err
	}
	if err := os.Mkdir(partial, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(partial))
		}
	}()
	db, err := openDB(badgerOptions(partial, opts.Logger).WithNumCompactors(0))
	if err != nil {
		return err
	}
	start, err := load(db, room, at, pairs)
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	h, err := openHead(partial, headSlot{})
	if err != nil {
		return err
	}
	if err := errors.Join(h.write(start, true), h.close(), durable.SyncDir(partial)); err != nil {
		return err
	}
	return errors.Join(os.Rename(partial, incoming), durable.SyncDir(dir))
}

// load streams the pairs into an empty database, as finished tables.
func load(db *bdg.DB, room *stagingRoom, at uint64, pairs iter.Seq2[store.KV, error]) (point, error) {
	w := db.NewStreamWriter()
	if err := w.Prepare(); err != nil {
		return point{}, err
	}
	s := stream{writer: w, buf: z.NewBuffer(streamBytes+store.MaxValueBytes, "import"), at: at, room: room}
	defer func() { _ = s.buf.Release() }()
	start, err := s.fill(pairs)
	if err != nil {
		w.Cancel()
		return point{}, err
	}
	return start, w.Flush()
}

// streamBytes go to Badger at once.
const streamBytes = 4 << 20

// stream gathers what goes to Badger, all at one version.
type stream struct {
	writer *bdg.StreamWriter
	buf    *z.Buffer
	at     uint64
	room   *stagingRoom
}

func (s *stream) fill(pairs iter.Seq2[store.KV, error]) (point, error) {
	var (
		sum  change
		last string
	)
	for kv, err := range pairs {
		switch {
		case err != nil:
			return point{}, err
		case kv.Key <= last:
			return point{}, fmt.Errorf("key %q comes after %q: pairs must be in order", kv.Key, last)
		case kv.ModRevision == 0 || kv.ModRevision > s.at:
			return point{}, fmt.Errorf("key %q is of revision %d, in a store of revision %d", kv.Key, kv.ModRevision, s.at)
		}
		if err := store.CheckTxn(nil, []store.Op{store.Put(kv.Key, kv.Value)}, nil); err != nil {
			return point{}, err
		}
		last = kv.Key
		st := newState(kv.Key, kv.Value, kv.ModRevision)
		sum.replace(state{}, st)
		if err := s.add(dataKey(kv.Key), st.stored); err != nil {
			return point{}, err
		}
	}
	start := origin(s.at, sum.keys, sum.sum)
	return start, errors.Join(
		s.add(compactedKey, encodeCompacted(start)),
		s.add(formatKey, []byte(format)),
		s.send(),
	)
}

func (s *stream) add(key, value []byte) error {
	bdg.KVToBuffer(&pb.KV{Key: key, Value: value, Version: s.at}, s.buf)
	if s.buf.LenNoPadding() < streamBytes {
		return nil
	}
	return s.send()
}

func (s *stream) send() error {
	if err := s.room.check(0); err != nil {
		return err
	}
	err := s.writer.Write(s.buf)
	s.buf.Reset()
	return err
}

// snapshot reads the pairs of a revision.
func snapshot(db *bdg.DB, revision uint64) iter.Seq2[store.KV, error] {
	return func(yield func(store.KV, error) bool) {
		view := db.NewTransactionAt(revision, false)
		defer view.Discard()
		it := under(view, dataPrefix)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			st, err := itemState(it.Item())
			kv := store.KV{Key: string(trimDataPrefix(it.Item().Key())), Value: st.value, ModRevision: st.revision}
			if !yield(kv, err) || err != nil {
				return
			}
		}
	}
}

// install puts what is staged in the place of what is there. What is there is
// kept.
func install(dir string) error {
	if err := os.Rename(filepath.Join(dir, incomingName), filepath.Join(dir, clearingName)); err != nil {
		return err
	}
	if err := durable.SyncDir(dir); err != nil {
		return err
	}
	return finishInstall(dir)
}

// finishInstall does what is left to be done of an installation.
func finishInstall(dir string) error {
	clearing, moving := filepath.Join(dir, clearingName), filepath.Join(dir, movingName)
	if _, err := os.Stat(clearing); err == nil {
		aside := filepath.Join(dir, damagedName+time.Now().UTC().Format("20060102T150405.000Z"))
		if err := moveFiles(dir, aside); err != nil {
			return err
		}
		if err := errors.Join(durable.SyncDir(dir), os.Rename(clearing, moving), durable.SyncDir(dir)); err != nil {
			return err
		}
	}
	if _, err := os.Stat(moving); err != nil {
		return nil // nothing to do: the usual case
	}
	if err := moveFiles(moving, dir); err != nil {
		return err
	}
	return errors.Join(durable.SyncDir(dir), os.Remove(moving), durable.SyncDir(dir))
}

// moveFiles moves the files of one folder, but for the lock, to another, which
// it makes if there are any.
func moveFiles(from, to string) error {
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, file := range files {
		if !file.Type().IsRegular() || file.Name() == lockName {
			continue
		}
		if err := os.MkdirAll(to, 0o700); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(from, file.Name()), filepath.Join(to, file.Name())); err != nil {
			return err
		}
	}
	if _, err := os.Stat(to); err != nil {
		return nil
	}
	return durable.SyncDir(to)
}

// The tree on disk. A tree is saved as its tiles first and then, in one step,
// the statement (a checkpoint) that says how far they count: after a crash
// there may be tiles beyond it, which are written again.

package merkle

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/sdk/durable"
)

// Save puts the tree away as it is, then calls state with its size, which
// replaces the statement about the one before. Full tiles stay in memory until
// that has worked.
func (t *Tree) Save(state func(size int64) error) error {
	size, tiles := t.snapshot()
	dirs := map[string]bool{}
	for tile, content := range tiles {
		path := filepath.Join(t.dir, tile.Path())
		if err := makeDirs(t.dir, filepath.Dir(path), dirs); err != nil {
			return err
		}
		if err := writeSynced(path, content); err != nil {
			return err
		}
	}
	for dir := range dirs {
		if err := durable.SyncDir(dir); err != nil {
			return err
		}
	}
	if err := state(size); err != nil {
		return err
	}
	return t.removePartial(t.saved(size, tiles), size)
}

// makeDirs makes dir below top, and notes it and all that are new or get a name.
func makeDirs(top, dir string, noted map[string]bool) error {
	if noted[dir] {
		return nil
	}
	noted[dir] = true
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, os.ErrNotExist) && dir != top {
		if err = makeDirs(top, filepath.Dir(dir), noted); err == nil {
			err = os.Mkdir(dir, 0o700)
		}
	}
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	noted[filepath.Dir(dir)] = true
	return err
}

func writeSynced(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// removePartial removes the partial tiles that the tree of size before had and
// the one of size has not.
func (t *Tree) removePartial(before, size int64) error {
	var errs []error
	for level := 0; before>>(Height*level) > 0; level++ {
		old := partial(before, level)
		if old.Width == 0 || old == partial(size, level) {
			continue
		}
		path := filepath.Join(t.dir, old.Path())
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		_ = os.Remove(filepath.Dir(path)) // stays while there is another
	}
	return errors.Join(errs...)
}

// Prune removes the full tiles that no proof about leaves from index first on
// needs: those that end at or before it. They go in order, so that what is left
// never has a gap.
func (t *Tree) Prune(first int64) error {
	for level := 0; first>>(Height*(level+1)) > 0; level++ {
		end := first >> (Height * (level + 1))
		begin := end
		for begin > 0 && t.onDisk(level, begin-1) {
			begin--
		}
		for n := begin; n < end; n++ {
			if err := t.remove(level, n); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Tree) onDisk(level int, n int64) bool {
	_, err := os.Lstat(filepath.Join(t.dir, Tile{Level: level, N: n, Width: TileWidth}.Path()))
	return err == nil
}

// remove removes a full tile, and the folders that it leaves empty.
func (t *Tree) remove(level int, n int64) error {
	path := filepath.Join(t.dir, Tile{Level: level, N: n, Width: TileWidth}.Path())
	if err := os.Remove(path); err != nil {
		return err
	}
	for dir := filepath.Dir(path); strings.HasPrefix(filepath.Base(dir), "x"); dir = filepath.Dir(dir) {
		if os.Remove(dir) != nil {
			break // not empty
		}
	}
	return nil
}

// Verified reads the hashes of the tree in dir of so many leaves, each proven to
// belong to the root hash: a tile that was changed is an error.
func Verified(dir string, size int64, root tlog.Hash) tlog.HashReader {
	return tlog.TileHashReader(tlog.Tree{N: size, Hash: root}, &files{dir: dir, proven: make(map[tlog.Tile][]byte)})
}

// files implements tlog.TileReader.
type files struct {
	dir    string
	proven map[tlog.Tile][]byte // upper levels, which each proof goes through
}

// Height implements tlog.TileReader.
func (f *files) Height() int { return Height }

// ReadTiles implements tlog.TileReader.
func (f *files) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	contents := make([][]byte, len(tiles))
	for i, t := range tiles {
		if content, ok := f.proven[t]; ok {
			contents[i] = content
			continue
		}
		hashes, err := readTile(f.dir, Tile{Level: t.L, N: t.N, Width: t.W})
		if err != nil {
			return nil, err
		}
		contents[i] = encode(hashes)
	}
	return contents, nil
}

// SaveTiles implements tlog.TileReader.
func (f *files) SaveTiles(tiles []tlog.Tile, contents [][]byte) {
	for i, t := range tiles {
		if t.L > 0 {
			f.proven[t] = contents[i]
		}
	}
}

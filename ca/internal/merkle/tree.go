// Package merkle keeps the Merkle tree (RFC 6962) of a log's entries in a
// folder, as the tiles of C2SP tlog-tiles: the names and contents of its files
// are those that are served. What the entries are, and who signs for the tree,
// is its user's matter.
//
// The folder is not what makes an entry durable: it is written later, all at
// once (Save), and what it lacks is added again from the entries.
package merkle

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/mod/sumdb/tlog"
)

// Tree is a growing tree. It is safe for concurrent use; Save and Prune are
// called by one goroutine.
type Tree struct {
	dir string

	mu sync.RWMutex
	// guarded by mu
	size int64
	edge [][]tlog.Hash        // of each level, the hashes that do not fill a tile yet
	full map[Tile][]tlog.Hash // full tiles that are not on disk yet
	base int64                // the size that is on disk
}

// Open loads the tree of size leaves from dir, where Save has left it. Nothing
// needs to be there for size 0.
func Open(dir string, size int64) (*Tree, error) {
	t := &Tree{dir: dir, size: size, base: size, full: make(map[Tile][]tlog.Hash)}
	for level := 0; size>>(Height*level) > 0; level++ {
		t.edge = append(t.edge, make([]tlog.Hash, 0, TileWidth))
		tile := partial(size, level)
		if tile.Width == 0 {
			continue
		}
		hashes, err := readTile(dir, tile)
		if err != nil {
			return nil, err
		}
		t.edge[level] = append(t.edge[level], hashes...)
	}
	return t, nil
}

// readTile reads a tile from disk: the file with its width, or what it became.
func readTile(dir string, t Tile) ([]tlog.Hash, error) {
	content, err := os.ReadFile(filepath.Join(dir, t.Path()))
	if errors.Is(err, os.ErrNotExist) && t.Width < TileWidth {
		whole := t
		whole.Width = TileWidth
		if content, err = os.ReadFile(filepath.Join(dir, whole.Path())); err == nil && len(content) == TileWidth*tlog.HashSize {
			content = content[:t.Width*tlog.HashSize]
		}
	}
	if err != nil {
		return nil, fmt.Errorf("read a tile: %w", err)
	}
	hashes, err := t.decode(content)
	if err != nil {
		return nil, fmt.Errorf("read the tile %s: %w", t.Path(), err)
	}
	return hashes, nil
}

// Add appends a leaf by its hash.
func (t *Tree) Add(leaf tlog.Hash) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for level := 0; ; level++ {
		if level == len(t.edge) {
			t.edge = append(t.edge, make([]tlog.Hash, 0, TileWidth))
		}
		t.edge[level] = append(t.edge[level], leaf)
		if len(t.edge[level]) < TileWidth {
			break
		}
		tile := Tile{Level: level, N: t.size >> (Height * (level + 1)), Width: TileWidth}
		t.full[tile] = t.edge[level]
		leaf = subtree(t.edge[level])
		t.edge[level] = make([]tlog.Hash, 0, TileWidth)
	}
	t.size++
}

// subtree is the root over a power of two of hashes.
func subtree(hashes []tlog.Hash) tlog.Hash {
	if len(hashes) == 1 {
		return hashes[0]
	}
	half := len(hashes) / 2
	return tlog.NodeHash(subtree(hashes[:half]), subtree(hashes[half:]))
}

// Size is the number of leaves.
func (t *Tree) Size() int64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.size
}

// Root is the root hash of the first size leaves.
func (t *Tree) Root(size int64) (tlog.Hash, error) { return tlog.TreeHash(size, t.reader()) }

// Leaf is the hash of the leaf with this index.
func (t *Tree) Leaf(index int64) (tlog.Hash, error) {
	hashes, err := t.reader().ReadHashes([]int64{tlog.StoredHashIndex(0, index)})
	if err != nil {
		return tlog.Hash{}, err
	}
	return hashes[0], nil
}

// ProveLeaf proves that the leaf with this index is in the tree of the first
// size leaves.
func (t *Tree) ProveLeaf(size, index int64) ([]tlog.Hash, error) {
	return tlog.ProveRecord(size, index, t.reader())
}

// ProveGrowth proves that the tree of size leaves begins with the one of before.
func (t *Tree) ProveGrowth(size, before int64) ([]tlog.Hash, error) {
	if before == 0 || before == size {
		return nil, nil // anything begins with nothing
	}
	return tlog.ProveTree(size, before, t.reader())
}

// Tile is the content of a tile, full or as wide as asked for.
func (t *Tree) Tile(tile Tile) ([]byte, error) {
	if tile.Level < 0 || !tile.In(t.Size()) {
		return nil, fmt.Errorf("%w: the tree has no tile %s", os.ErrNotExist, tile.Path())
	}
	hashes, err := t.hashes(tile)
	if err != nil {
		return nil, err
	}
	return encode(hashes[:tile.Width]), nil
}

// hashes are those of a tile that the tree has, or of one that is wider.
func (t *Tree) hashes(tile Tile) ([]tlog.Hash, error) {
	t.mu.RLock()
	if partial(t.size, tile.Level).N == tile.N {
		defer t.mu.RUnlock()
		return append([]tlog.Hash(nil), t.edge[tile.Level]...), nil
	}
	tile.Width = TileWidth
	full, ok := t.full[tile]
	t.mu.RUnlock()
	if ok {
		return full, nil // written to no more
	}
	return readTile(t.dir, tile)
}

// reader reads each tile once.
func (t *Tree) reader() tlog.HashReader {
	read := make(map[Tile][]tlog.Hash)
	return tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for i, index := range indexes {
			level, n := tlog.SplitStoredHashIndex(index)
			in := level % Height // levels above the tile's own hashes
			tile := Tile{Level: level / Height, N: n << in >> Height}
			tile.Width = int((n+1)<<in - tile.N<<Height)
			if !tile.In(t.Size()) {
				return nil, fmt.Errorf("the tree of %d leaves has no hash %d at level %d", t.Size(), n, level)
			}
			key := Tile{Level: tile.Level, N: tile.N}
			if len(read[key]) < tile.Width {
				hashes, err := t.hashes(tile)
				if err != nil {
					return nil, err
				}
				read[key] = hashes
			}
			out[i] = subtree(read[key][tile.Width-1<<in : tile.Width])
		}
		return out, nil
	})
}

// snapshot is what Save writes.
func (t *Tree) snapshot() (size int64, tiles map[Tile][]byte) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	tiles = make(map[Tile][]byte, len(t.full)+len(t.edge))
	for tile, hashes := range t.full {
		tiles[tile] = encode(hashes)
	}
	for level, hashes := range t.edge {
		// What is on disk already must not be touched: it counts.
		if tile := partial(t.size, level); tile.Width > 0 && tile != partial(t.base, level) {
			tiles[tile] = encode(hashes)
		}
	}
	return t.size, tiles
}

// partial is the tile at the right edge of a level; its width is 0 where there
// is none.
func partial(size int64, level int) Tile {
	return Tile{Level: level, N: size >> (Height * (level + 1)), Width: int(size >> (Height * level) & (TileWidth - 1))}
}

// saved forgets what is on disk by now, and returns the size that was before.
func (t *Tree) saved(size int64, tiles map[Tile][]byte) (before int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for tile := range tiles {
		delete(t.full, tile)
	}
	before, t.base = t.base, size
	return before
}

// Unsaved is how many leaves are not on disk.
func (t *Tree) Unsaved() int64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.size - t.base
}

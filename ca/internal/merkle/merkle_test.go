// The tree against one that is computed naively, through saves, losses of what
// was not saved, and pruning.

package merkle

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"
)

// model holds every hash of a tree.
type model struct{ hashes []tlog.Hash }

func (m *model) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	var out []tlog.Hash
	for _, i := range indexes {
		out = append(out, m.hashes[i])
	}
	return out, nil
}

func (m *model) add(t testing.TB, n int64, entry []byte) {
	t.Helper()
	hashes, err := tlog.StoredHashes(n, entry, m)
	if err != nil {
		t.Fatal(err)
	}
	m.hashes = append(m.hashes, hashes...)
}

func entryOf(n int64) []byte { return fmt.Appendf(nil, "entry %d", n) }

// checkTree compares the tree with the model from leaf first on, and has what
// it proves checked by tlog.
func checkTree(t *rapid.T, tree *Tree, m *model, first int64) {
	size := tree.Size()
	root, err := tree.Root(size)
	want, wantErr := tlog.TreeHash(size, m)
	if err := errors.Join(err, wantErr); err != nil || root != want {
		t.Fatalf("root of %d = %v, %v; want %v", size, root, err, want)
	}
	if size <= first {
		return
	}
	index := rapid.Int64Range(first, size-1).Draw(t, "index")
	proof, err := tree.ProveLeaf(size, index)
	if err == nil {
		err = tlog.CheckRecord(proof, size, root, index, tlog.RecordHash(entryOf(index)))
	}
	if err != nil {
		t.Fatalf("leaf %d of %d: %v", index, size, err)
	}
	before := rapid.Int64Range(max(first, 1), size).Draw(t, "before")
	old, err := tlog.TreeHash(before, m)
	if err != nil {
		t.Fatal(err)
	}
	if proof, err = tree.ProveGrowth(size, before); err == nil && before != size {
		err = tlog.CheckTree(proof, size, root, before, old)
	}
	if err != nil {
		t.Fatalf("growth from %d to %d: %v", before, size, err)
	}
}

func TestTreeIsTheNaiveOne(tt *testing.T) {
	rapid.Check(tt, func(t *rapid.T) {
		dir := tt.TempDir()
		tree, err := Open(dir, 0)
		if err != nil {
			t.Fatal(err)
		}
		m, count, saved, first := &model{}, int64(0), int64(0), int64(0)
		for range rapid.IntRange(1, 4).Draw(t, "steps") {
			for n := rapid.SampledFrom([]int64{0, 1, 2, 255, 256, 600}).Draw(t, "more"); n > 0; n-- {
				m.add(tt, count, entryOf(count))
				tree.Add(tlog.RecordHash(entryOf(count)))
				count++
			}
			checkTree(t, tree, m, first)
			if rapid.Bool().Draw(t, "save") {
				if err := tree.Save(func(size int64) error { saved = size; return nil }); err != nil {
					t.Fatal(err)
				}
				checkTree(t, tree, m, first)
				checkFiles(t, dir, saved, first, m)
			}
			if rapid.Bool().Draw(t, "prune") {
				first = rapid.Int64Range(first, saved).Draw(t, "first")
				if err := tree.Prune(first); err != nil {
					t.Fatal(err)
				}
				checkTree(t, tree, m, first)
			}
			if rapid.Bool().Draw(t, "crash") {
				if tree, err = Open(dir, saved); err != nil {
					t.Fatal(err)
				}
				for n := saved; n < count; n++ {
					tree.Add(tlog.RecordHash(entryOf(n)))
				}
				checkTree(t, tree, m, first)
			}
		}
	})
}

// checkFiles: on disk is what tlog-tiles says of a tree of this size, and every
// hash of it is proven to belong to the root.
func checkFiles(t *rapid.T, dir string, size, first int64, m *model) {
	want := map[string]bool{}
	for _, tile := range tlog.NewTiles(Height, 0, size) {
		named := Tile{Level: tile.L, N: tile.N, Width: tile.W}
		if tile.W < TileWidth || named.End() > first {
			want[named.Path()] = true
		}
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			name, _ := filepath.Rel(dir, path)
			if !want[name] {
				t.Errorf("%s is none of the tiles of %d leaves from %d on", name, size, first)
			}
			delete(want, name)
		}
		return err
	})
	if err != nil || len(want) > 0 {
		t.Fatalf("missing tiles of %d leaves: %v, %v", size, want, err)
	}
	root, err := tlog.TreeHash(size, m)
	if err != nil || size == 0 {
		return
	}
	index := tlog.StoredHashIndex(0, rapid.Int64Range(min(first, size-1), size-1).Draw(t, "proven"))
	got, err := Verified(dir, size, root).ReadHashes([]int64{index})
	if err != nil || got[0] != m.hashes[index] {
		t.Fatalf("verified hash %d = %v, %v", index, got, err)
	}
}

// TestSaveWritesOnlyWhatIsNew: a tile that a checkpoint counts on is not
// written again, or a crash meanwhile would cut it.
func TestSaveWritesOnlyWhatIsNew(t *testing.T) {
	dir := t.TempDir()
	tree, err := Open(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	grow := func(n int64) {
		for range n {
			tree.Add(tlog.RecordHash(entryOf(tree.Size())))
		}
		if err := tree.Save(func(int64) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	grow(3 * TileWidth)
	upper := filepath.Join(dir, "tile/1/000.p/3")
	if err := os.Chmod(upper, 0o400); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(upper)
	if err != nil {
		t.Fatal(err)
	}
	grow(1)
	after, err := os.Stat(upper)
	if err != nil || !after.ModTime().Equal(before.ModTime()) {
		t.Errorf("tile 1/000.p/3 was written again: %v", err)
	}
}

func TestDamagedTileIsAnError(t *testing.T) {
	dir := t.TempDir()
	tree, err := Open(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		tree.Add(tlog.RecordHash(entryOf(tree.Size())))
	}
	if err := tree.Save(func(int64) error { return nil }); err != nil {
		t.Fatal(err)
	}
	root, err := tree.Root(1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tile/0/001", "tile/1/000.p/3", "tile/0/003.p/232"} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		content[40] ^= 1
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = Verified(dir, 1000, root).ReadHashes([]int64{tlog.StoredHashIndex(0, 300), tlog.StoredHashIndex(0, 900)})
		if err == nil {
			t.Errorf("a changed %s was taken", name)
		}
		content[40] ^= 1
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(filepath.Join(dir, "tile/0/003.p/232"), 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, 1000); err == nil {
		t.Error("a tree with a tile that is cut short was opened")
	}
}

func TestTilePaths(t *testing.T) {
	for want, tile := range map[string]Tile{
		"tile/0/000":                          {Width: 256},
		"tile/0/x001/x234/067.p/1":            {N: 1234067, Width: 1},
		"tile/3/x001/000":                     {Level: 3, N: 1000, Width: 256},
		"tile/entries/x001/x000/003.p/255":    {Level: EntriesLevel, N: 1000003, Width: 255},
		"tile/0/x036/x028/x797/x018/x963/967": {N: 36028797018963967, Width: 256},
	} {
		if got := tile.Path(); got != want {
			t.Errorf("Path(%+v) = %s; want %s", tile, got, want)
		}
		if got, err := ParseTile(want); err != nil || got != tile {
			t.Errorf("ParseTile(%s) = %+v, %v; want %+v", want, got, err, tile)
		}
	}
	for _, bad := range []string{
		"", "tile", "tile/0", "tile/0/", "tile/0/1", "tile/0/0001", "tile/00/000", "tile/-1/000", "tile/+1/000", "tile/8/000", "tile/64/000",
		"tile/0/x000/001", "tile/0/001/x002", "tile/0/000.p/0", "tile/0/000.p/256", "tile/0/000.p/01", "tile/0/000.p/", "tile/0/000.p/1/",
		"tile/data/000", "tile/0/../000", "tile/0/000/", "/tile/0/000", "tile/7/x999/999", "tile/0/x999/x999/x999/x999/x999/x999/999",
	} {
		if got, err := ParseTile(bad); err == nil {
			t.Errorf("ParseTile(%q) = %+v; want an error", bad, got)
		}
	}
}

func FuzzParseTile(f *testing.F) {
	f.Add("tile/0/x001/x234/067.p/1")
	f.Add("tile/entries/000")
	f.Fuzz(func(t *testing.T, path string) {
		tile, err := ParseTile(path)
		if err != nil {
			return
		}
		if tile.Path() != path || strings.Contains(path, "..") || filepath.Clean(path) != path || tile.End() <= 0 {
			t.Fatalf("%q is taken for %+v", path, tile)
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	two, _ := AppendEntry(nil, []byte("one"))
	two, _ = AppendEntry(two, nil)
	f.Add(two)
	f.Add([]byte{0, 9, 1})
	f.Fuzz(func(t *testing.T, bundle []byte) {
		entries, err := ParseBundle(bundle)
		if err != nil {
			return
		}
		var again []byte
		for _, e := range entries {
			if again, err = AppendEntry(again, e); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(again, bundle) || len(entries) > TileWidth {
			t.Fatalf("%d entries of %x come back as %x", len(entries), bundle, again)
		}
	})
}

func TestBundleHoldsLimitedEntries(t *testing.T) {
	if _, err := AppendEntry(nil, make([]byte, 1<<16)); err == nil {
		t.Error("an entry of 64 KiB was taken")
	}
	if _, err := ParseBundle(slices.Repeat([]byte{0, 0}, TileWidth+1)); err == nil {
		t.Error("a bundle of 257 entries was taken")
	}
}

func BenchmarkAdd(b *testing.B) {
	tree, err := Open(b.TempDir(), 0)
	if err != nil {
		b.Fatal(err)
	}
	line := bytes.Repeat([]byte("x"), 700)
	b.ReportAllocs()
	for b.Loop() {
		tree.Add(tlog.RecordHash(line))
		if tree.Unsaved() > 1<<16 {
			b.StopTimer()
			tree.saved(tree.snapshot())
			b.StartTimer()
		}
	}
}

// Names of tiles, as C2SP tlog-tiles has them: tile/LEVEL/NUMBER, the number in
// groups of three digits, with .p/WIDTH while the tile is not full.

package merkle

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

const (
	// Height is that of the tree below a full tile.
	Height = 8
	// TileWidth hashes, or entries of a bundle, fill a tile.
	TileWidth = 1 << Height
	// EntriesLevel is the level of bundles of entries, which have tiles' names.
	EntriesLevel = -1
	maxLevel     = 63 / Height // a tree has less than 2^63 leaves
)

// Tile names a tile. It is comparable.
type Tile struct {
	Level int   // EntriesLevel for a bundle of entries
	N     int64 // its number within the level
	Width int   // 1 to TileWidth
}

// Path is the tile's name below the log's address.
func (t Tile) Path() string {
	level := "entries"
	if t.Level != EntriesLevel {
		level = strconv.Itoa(t.Level)
	}
	number := fmt.Sprintf("%03d", t.N%1000)
	for n := t.N / 1000; n > 0; n /= 1000 {
		number = fmt.Sprintf("x%03d/%s", n%1000, number)
	}
	path := "tile/" + level + "/" + number
	if t.Width < TileWidth {
		path += ".p/" + strconv.Itoa(t.Width)
	}
	return path
}

// ParseTile reads what Path writes, and nothing else.
func ParseTile(path string) (Tile, error) {
	bad := fmt.Errorf("%.100q is not the name of a tile", path)
	rest, ok := strings.CutPrefix(path, "tile/")
	level, rest, more := strings.Cut(rest, "/")
	if !ok || !more {
		return Tile{}, bad
	}
	t := Tile{Level: EntriesLevel, Width: TileWidth}
	var err, widthErr error
	if level != "entries" {
		t.Level, err = strconv.Atoi(level)
	}
	number, width, partial := strings.Cut(rest, ".p/")
	if partial {
		t.Width, widthErr = strconv.Atoi(width)
	}
	t.N, ok = parseNumber(number)
	if !ok || err != nil || widthErr != nil || t.Level < EntriesLevel || t.Level > maxLevel ||
		t.Width < 1 || t.Width > TileWidth || t.N > t.last() || t.Path() != path {
		return Tile{}, bad
	}
	return t, nil
}

func parseNumber(text string) (n int64, ok bool) {
	if len(text) > len("x000/x000/x000/x000/x000/x000") {
		return 0, false
	}
	for part := range strings.SplitSeq(text, "/") {
		digits := strings.TrimPrefix(part, "x")
		d, err := strconv.ParseUint(digits, 10, 16)
		if err != nil || len(digits) != 3 {
			return 0, false
		}
		n = n*1000 + int64(d)
	}
	return n, true
}

// last is the highest number that a tile of this level can have.
func (t Tile) last() int64 { return (1<<63 - 1) >> (Height * (max(t.Level, 0) + 1)) }

// End is the index of the first leaf after those below the full tile.
func (t Tile) End() int64 { return (t.N + 1) << (Height * (max(t.Level, 0) + 1)) }

// In says whether a tree of so many leaves has the tile, with this width or as
// the full one.
func (t Tile) In(size int64) bool {
	return t.N<<Height+int64(t.Width) <= size>>(Height*max(t.Level, 0))
}

// decode splits the content of a tile.
func (t Tile) decode(content []byte) ([]tlog.Hash, error) {
	if len(content) != t.Width*tlog.HashSize {
		return nil, fmt.Errorf("it has %d bytes instead of %d", len(content), t.Width*tlog.HashSize)
	}
	hashes := make([]tlog.Hash, t.Width)
	for i := range hashes {
		copy(hashes[i][:], content[i*tlog.HashSize:])
	}
	return hashes, nil
}

// encode is the content of a tile.
func encode(hashes []tlog.Hash) []byte {
	content := make([]byte, 0, len(hashes)*tlog.HashSize)
	for _, h := range hashes {
		content = append(content, h[:]...)
	}
	return content
}

// maxEntry is the longest entry that a bundle can hold.
const maxEntry = 1<<16 - 1

// AppendEntry adds an entry to a bundle.
func AppendEntry(bundle, entry []byte) ([]byte, error) {
	if len(entry) > maxEntry {
		return nil, fmt.Errorf("an entry has %d bytes; a bundle holds at most %d", len(entry), maxEntry)
	}
	bundle = append(bundle, byte(len(entry)>>8), byte(len(entry)))
	return append(bundle, entry...), nil
}

// ParseBundle splits a bundle into its entries, which share its memory.
func ParseBundle(bundle []byte) (entries [][]byte, err error) {
	for len(bundle) > 0 {
		if len(bundle) < 2 {
			return nil, errors.New("read a bundle of entries: it is cut short")
		}
		n := int(bundle[0])<<8 | int(bundle[1])
		if len(bundle) < 2+n || len(entries) == TileWidth {
			return nil, errors.New("read a bundle of entries: it is cut short, or has too many")
		}
		entries, bundle = append(entries, bundle[2:2+n]), bundle[2+n:]
	}
	return entries, nil
}

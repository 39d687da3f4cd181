// Showing others what is in the log: the records of SVIDs by their serial
// numbers with proofs, and the tree itself, as C2SP tlog-tiles has it served.

package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/ca/internal/merkle"
)

// Proof shows that the log of a checkpoint holds an entry.
type Proof struct {
	Serial string
	Index  int64
	Entry  []byte // the line, without its newline
	Hashes []tlog.Hash
}

// Begins says from where on the log has records: what was issued before that it
// cannot say.
type Begins struct {
	Index int64
	At    time.Time
}

// Prove looks for the records that say that SVIDs with these serial numbers were
// issued, and proves those that it finds under the checkpoint that it returns.
// It reads the whole log.
func (l *Log) Prove(ctx context.Context, serials ...string) (proofs []Proof, under Signed, begins Begins, err error) {
	first, err := Begin(l.path)
	if err != nil {
		return nil, under, begins, fmt.Errorf("look into the audit log: %w", err)
	}
	wanted := make(map[string]bool, len(serials))
	for _, s := range serials {
		wanted[s] = true
	}
	for line, err := range Lines(l.path, first) {
		if err == nil {
			err = ctx.Err()
		}
		if err == nil && line.Seq == first {
			begins, err = beginOf(line)
		}
		if err != nil {
			return nil, under, begins, fmt.Errorf("look into the audit log: %w", err)
		}
		if serial := issuedIn(line.Text); serial != "" && wanted[serial] {
			proofs = append(proofs, Proof{Serial: serial, Index: int64(line.Seq) - 1, Entry: bytes.Clone(line.Text)})
		}
	}
	// After the walk: a line may be read before it is synced, and is none then.
	if under, err = l.Checkpoint(); err != nil {
		return nil, under, begins, err
	}
	acknowledged := proofs[:0]
	for _, p := range proofs {
		if p.Index >= under.Size {
			continue
		}
		if p.Hashes, err = l.tree.ProveLeaf(under.Size, p.Index); err != nil {
			return nil, under, begins, fmt.Errorf("prove record %d: %w", p.Index+1, err)
		}
		acknowledged = append(acknowledged, p)
	}
	return acknowledged, under, begins, nil
}

func beginOf(line Line) (Begins, error) {
	var h header
	if err := json.Unmarshal(line.Text, &h); err != nil {
		return Begins{}, fmt.Errorf("record %d: %w", line.Seq, err)
	}
	return Begins{Index: int64(line.Seq) - 1, At: h.Time}, nil
}

var serialMember = []byte(`"serial":"`)

// issuedIn is the serial number of the SVID that a line says was issued; "": it
// says nothing of the kind. A quote in a text is escaped, so that none looks
// like a member.
func issuedIn(line []byte) string {
	_, rest, ok := bytes.Cut(line, serialMember)
	if !ok || !bytes.Contains(rest, []byte(`"signed_sha256":"`)) {
		return ""
	}
	serial, _, _ := bytes.Cut(rest, []byte{'"'})
	return string(serial)
}

// ProveGrowth proves that the log of size entries goes on from the one of before.
func (l *Log) ProveGrowth(size, before int64) ([]tlog.Hash, error) {
	return l.tree.ProveGrowth(size, before)
}

// Root is the root hash that the log had when it had size entries.
func (l *Log) Root(size int64) (tlog.Hash, error) { return l.tree.Root(size) }

// Tile is the content of a tile, or of a bundle of entries. What the log does not
// have, or no more, is os.ErrNotExist.
func (l *Log) Tile(tile merkle.Tile) ([]byte, error) {
	if tile.Level != merkle.EntriesLevel {
		return l.tree.Tile(tile)
	}
	if !tile.In(l.tree.Size()) {
		return nil, fmt.Errorf("%w: the log has no bundle %s", os.ErrNotExist, tile.Path())
	}
	var bundle []byte
	n := 0
	for line, err := range Lines(l.path, uint64(tile.N)*merkle.TileWidth+1) {
		if errors.Is(err, ErrDropped) {
			return nil, fmt.Errorf("%w: %v", os.ErrNotExist, err)
		}
		if err == nil {
			bundle, err = merkle.AppendEntry(bundle, line.Text)
		}
		if err != nil {
			return nil, fmt.Errorf("read bundle %s: %w", tile.Path(), err)
		}
		if n++; n == tile.Width {
			return bundle, nil
		}
	}
	return nil, fmt.Errorf("read bundle %s: the log ends within it", tile.Path())
}

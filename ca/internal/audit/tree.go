// The tree beside the chain. It is saved every few seconds with a checkpoint;
// what came later is added again from the lines when the log is opened, and a
// log that has less than its checkpoint, or something else, is refused.

package audit

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/ca/internal/merkle"
	"merlon.dev/sdk/checkpoint"
)

const (
	checkpointFile = "checkpoint"
	// chainFile holds the certificates of the key that signed it, PEM, the log's
	// first and the root last.
	chainFile = "certificates.pem"
)

// errNotDir: a log at a path such as /dev/full has no place for a tree.
var errNotDir = syscall.ENOTDIR

// treeDir is where the tree of the log at path is.
func treeDir(path string) string {
	stem, _ := split(path)
	return stem + ".tree"
}

// openTree loads the tree as of the last checkpoint, whoever signed it; nobody
// can say yet who should have.
func openTree(path string) (*merkle.Tree, checkpoint.Checkpoint, error) {
	dir := treeDir(path)
	signed, err := os.ReadFile(filepath.Join(dir, checkpointFile))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errNotDir) {
		tree, err := merkle.Open(dir, 0)
		return tree, checkpoint.Checkpoint{}, err
	}
	if err != nil {
		return nil, checkpoint.Checkpoint{}, err
	}
	last, err := checkpoint.Unverified(signed)
	if err != nil {
		return nil, last, fmt.Errorf("%s: %w", filepath.Join(dir, checkpointFile), err)
	}
	tree, err := merkle.Open(dir, last.Size)
	if err != nil {
		return nil, last, fmt.Errorf("the tree of its last checkpoint: %w", err)
	}
	if root, err := tree.Root(last.Size); err != nil || root != last.Root {
		return nil, last, errors.Join(fmt.Errorf("the tree in %s is not that of its checkpoint: it was damaged or changed", dir), err)
	}
	return tree, last, nil
}

// replay adds to the tree what the lines up to end have beyond it, after a
// check that they go on from it.
func replay(path string, tree *merkle.Tree, end link) error {
	size := uint64(tree.Size())
	if size == end.seq {
		return checkLast(path, tree, end.seq)
	}
	if err := checkLast(path, tree, size); err != nil {
		return err
	}
	before := link{}
	for line, err := range Lines(path, max(size, 1)) {
		if err != nil {
			return err
		}
		h, own, err := parseLine(line.Text)
		if err == nil && (before.seq > 0 || h.Seq == 1) {
			err = h.follows(before)
		}
		if err == nil && h.CheckpointSize > size {
			err = h.uncounted(int64(size))
		}
		if err != nil {
			return fmt.Errorf("record %d: %w", line.Seq, err)
		}
		if before = own; line.Seq > size {
			tree.Add(tlog.RecordHash(line.Text))
		}
	}
	if uint64(tree.Size()) != end.seq {
		return fmt.Errorf("it has records to %d, and the last is %d", tree.Size(), end.seq)
	}
	return nil
}

// checkLast compares record seq, the last that tree has, with its leaf.
func checkLast(path string, tree *merkle.Tree, seq uint64) error {
	if seq == 0 {
		return nil
	}
	leaf, err := tree.Leaf(int64(seq) - 1)
	if err != nil {
		return err
	}
	for line, err := range Lines(path, seq) {
		if err != nil {
			return err
		}
		if tlog.RecordHash(line.Text) != leaf {
			return fmt.Errorf("record %d is not the one that its checkpoint counts: it was changed", seq)
		}
		return nil
	}
	return fmt.Errorf("record %d is missing, which its checkpoint counts", seq)
}

func sameChain(a, b [][]byte) bool { return slices.EqualFunc(a, b, slices.Equal[[]byte]) }

package badger

// Holding what was copied against the store that it was copied from, also where
// that one is damaged: its head says how much it held, and the sum of it.

import (
	"fmt"
	"iter"

	"merlon.dev/ca/internal/store"
)

// Content tells what a store held at a revision: of two that are equal, each key
// has the same value from the same revision.
type Content struct{ Revision, Keys, Sum uint64 }

// Acknowledged says what the store in dir, which no CA may have open, held when
// its last write was acknowledged, whatever has become of it since. Zero: its
// head is gone.
func Acknowledged(dir string) (Content, error) {
	lock, err := lockDir(dir)
	if err != nil {
		return Content{}, fmt.Errorf("read what store %s held: %w", dir, err)
	}
	defer lock.dir.Close()
	head, err := readHead(dir)
	if err != nil {
		return Content{}, nil //nolint:nilerr // then it is not known
	}
	return Content{head.tip.revision, head.tip.keys, head.tip.sum}, nil
}

// ContentOf adds up pairs in any order, no key twice.
func ContentOf(revision uint64, pairs iter.Seq2[store.KV, error]) (Content, error) {
	var sum change
	for kv, err := range pairs {
		if err != nil {
			return Content{}, err
		}
		sum.replace(state{}, newState(kv.Key, kv.Value, kv.ModRevision))
	}
	return Content{revision, sum.keys, sum.sum}, nil
}

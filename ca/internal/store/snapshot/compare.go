// Comparing what was copied with what it was copied from.

package snapshot

import (
	"bytes"
	"fmt"
	"iter"

	"merlon.dev/ca/internal/store"
)

// Compare says whether two listings hold the same keys, values and
// ModRevisions, and returns how many. The error names the first difference.
func Compare(from, to iter.Seq2[store.KV, error]) (keys uint64, err error) {
	next, stop := iter.Pull2(to)
	defer stop()
	for want, err := range from {
		if err != nil {
			return keys, err
		}
		got, err, ok := next()
		switch {
		case err != nil:
			return keys, err
		case !ok || got.Key > want.Key:
			return keys, fmt.Errorf("key %q is missing in the copy", want.Key)
		case got.Key < want.Key:
			return keys, fmt.Errorf("key %q is in the copy alone", got.Key)
		case got.ModRevision != want.ModRevision:
			return keys, fmt.Errorf("key %q is of revision %d, and %d in the copy", want.Key, want.ModRevision, got.ModRevision)
		case !bytes.Equal(got.Value, want.Value):
			return keys, fmt.Errorf("key %q has another value in the copy", want.Key)
		}
		keys++
	}
	got, err, more := next()
	if err != nil {
		return keys, err
	}
	if more {
		return keys, fmt.Errorf("key %q is in the copy alone", got.Key)
	}
	return keys, nil
}

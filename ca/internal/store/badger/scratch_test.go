package badger

// Inspecting a store that was killed again and again before Badger could
// compact it.

import (
	"fmt"
	"log/slog"
	"maps"
	"math"
	"strings"
	"testing"

	bdg "github.com/dgraph-io/badger/v4"
)

// Badger lets 15 tables wait for compaction; logs that should become the next
// ones wait too, and with four of them so does whoever opens it. In a copy
// nobody compacts.
func TestOpenDoesNotWaitForCompaction(t *testing.T) {
	dir := sixRevisions(t)
	opts := badgerOptions(dir, slog.New(slog.DiscardHandler)).WithNumCompactors(0)
	var killed map[string][]byte
	for i := range opts.NumLevelZeroTablesStall {
		db, err := bdg.OpenManaged(opts.WithNumLevelZeroTablesStall(math.MaxInt))
		if err != nil {
			t.Fatal(err)
		}
		txn := db.NewTransactionAt(6, true)
		if err := txn.Set(fmt.Appendf(nil, "m/filler%d", i), nil); err != nil {
			t.Fatal(err)
		}
		if err := txn.CommitAt(6, nil); err != nil {
			t.Fatal(err)
		}
		killed = content(t, dir) // with its log
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for name, log := range maps.Clone(killed) {
		if strings.HasSuffix(name, memExt) {
			for i := range 4 { // lives that ended before it was a table
				killed[fmt.Sprintf("9000%d%s", i, memExt)] = log
			}
		}
	}
	put(t, dir, killed)
	if got, err := openStore(t, dir, Options{}).Revision(t.Context()); err != nil || got != 6 {
		t.Fatalf("Revision() = %d, %v; want 6", got, err)
	}
}

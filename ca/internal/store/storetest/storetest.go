// Package storetest is the conformance suite of the store interface. Every
// implementation passes it, so that nothing above the store needs to know
// which one it runs on.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"merlon.dev/ca/internal/store"
)

// patience bounds everything that must happen; a test that reaches it fails.
const patience = 30 * time.Second

// Backend is an implementation under test.
type Backend struct {
	// Open returns a new, empty store.
	Open func(t testing.TB) store.Store
	// Reopen closes s and returns a store over the same data.
	Reopen func(t testing.TB, s store.Store) store.Store
	// Compact lets the store forget its older revisions: Watch and List from
	// the revision that the store had before the call must then fail. It may
	// write keys under "compact/".
	Compact func(t testing.TB, s store.Store)
}

// Run runs the suite.
func Run(t *testing.T, b Backend) {
	for name, test := range map[string]func(*testing.T, Backend){
		"GetReturnsTheLatestValue":              testGet,
		"GetNeverSharesItsBytes":                testOwnership,
		"TxnWritesTheBranchThatItsComparesName": testCompare,
		"TxnRaisesTheRevisionOnlyByChanges":     testRevisions,
		"TxnRefusesWhatIsBeyondItsLimits":       testLimits,
		"TxnTakesTheLargestItAllows":            testLargest,
		"OneOf200CompareAndDeletesWins":         testOneWinner,
		"ConcurrentIncrementsAreNotLost":        testCounter,
		"ListIsOrderedAndBounded":               testList,
		"PagesShareOneRevisionWhileWritesGoOn":  testPages,
		"ListOfAnUnknownRevisionIsRefused":      testListCompacted,
		"WatchSendsEachRevisionOnceInOrder":     testWatchOrder,
		"WatchFiltersByPrefix":                  testWatchPrefix,
		"WatchResumesFromEveryRevision":         testWatchResume,
		"WatchOfAnUnknownRevisionIsRefused":     testWatchCompacted,
		"WatchReplaysToTheListing":              testReplay,
		"WatchEndsWithItsContext":               testWatchContext,
		"WatchEndsWithTheStore":                 testWatchClose,
		"SlowWatcherDelaysOnlyItself":           testSlowWatcher,
		"AcknowledgedWritesSurviveReopening":    testReopen,
		"ClosedStoreRefusesEverything":          testClosed,
		"CampaignHasOneLeader":                  testCampaign,
		"FenceHoldsWhileNobodyElseHasLed":       testFence,
		"CampaignEndsWithTheStore":              testCampaignClose,
		"BehavesLikeAMap":                       testModel,
	} {
		t.Run(name, func(t *testing.T) { test(t, b) })
	}
}

// open opens a store that is closed at the end of the test.
func open(t *testing.T, b Backend) store.Store {
	t.Helper()
	s := b.Open(t)
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func reopen(t *testing.T, b Backend, s store.Store) store.Store {
	t.Helper()
	s = b.Reopen(t, s)
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t testing.TB, s store.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
}

// within returns a context that ends when patience does.
func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func write(t testing.TB, s store.Store, ops ...store.Op) uint64 {
	t.Helper()
	res, err := s.Txn(within(t), nil, ops, nil)
	if err != nil || !res.Succeeded {
		t.Fatalf("Txn(%v) = %+v, %v", ops, res, err)
	}
	return res.Revision
}

func revisionOf(t testing.TB, s store.Store) uint64 {
	t.Helper()
	revision, err := s.Revision(within(t))
	if err != nil {
		t.Fatalf("Revision() = %v", err)
	}
	return revision
}

// listAll lists everything under prefix in pages of three.
func listAll(t testing.TB, s store.Store, prefix string) (kvs []store.KV, revision uint64) {
	t.Helper()
	var after string
	for {
		page, at, more, err := s.List(within(t), prefix, after, 3, revision)
		if err != nil {
			t.Fatalf("List(%q, %q, 3, %d) = %v", prefix, after, revision, err)
		}
		if revision != 0 && at != revision {
			t.Fatalf("List(%q, %q, 3, %d) answered at revision %d", prefix, after, revision, at)
		}
		kvs, revision = append(kvs, page...), at
		if !more {
			return kvs, revision
		}
		after = page[len(page)-1].Key
	}
}

func watch(t testing.TB, s store.Store, prefix string, after uint64) <-chan store.Batch {
	t.Helper()
	ch, err := s.Watch(within(t), prefix, after)
	if err != nil {
		t.Fatalf("Watch(%q, %d) = %v", prefix, after, err)
	}
	return ch
}

// next takes n batches.
func next(t testing.TB, ch <-chan store.Batch, n int) []store.Batch {
	t.Helper()
	batches := make([]store.Batch, 0, n)
	for len(batches) < n {
		select {
		case b, open := <-ch:
			if !open {
				t.Fatalf("watch ended after %d of %d batches", len(batches), n)
			}
			batches = append(batches, b)
		case <-time.After(patience):
			t.Fatalf("watch sent %d of %d batches", len(batches), n)
		}
	}
	return batches
}

func wantDiff(t testing.TB, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("%s differs (-want +got):\n%s", what, diff)
	}
}

func wantError(t testing.TB, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("%s = %v; want %v", what, got, want)
	}
}

func kv(key, value string, revision uint64) store.KV {
	return store.KV{Key: key, Value: []byte(value), ModRevision: revision}
}

func numbered(prefix string, i int) string { return fmt.Sprintf("%s%04d", prefix, i) }

// Realms are nobody's twice.

package replica

import (
	"sync"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/sdk/svid"
)

// However often some are skipped, there is one left to give; and none is given that
// can have been.
func TestSkippedRealmsLeaveSome(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		last, given := rapid.Uint32Range(0, svid.MaxRealm).Draw(rt, "last"), rapid.Uint32Range(0, svid.MaxRealm).Draw(rt, "given")
		before, after := max(last, given), skip(last, given)
		left := svid.MaxRealm - before
		if after < before || after-before > maxSkipped || left >= 2*maxSkipped && after-before != maxSkipped || left > 0 && after == svid.MaxRealm {
			rt.Errorf("after %d and %d: %d", last, given, after)
		}
	})
}

func TestEachRealmIsGivenOnce(t *testing.T) {
	st, err := badger.Open(t.TempDir(), badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	const wanted = 20
	var wg sync.WaitGroup
	var mu sync.Mutex
	given := make(map[uint32]bool) // guarded by mu
	for range wanted {
		wg.Go(func() {
			for {
				realm, cmp, op, err := NextRealm(t.Context(), st)
				if err != nil {
					t.Error(err)
					return
				}
				res, err := st.Txn(t.Context(), []store.Cmp{cmp}, []store.Op{op}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if !res.Succeeded {
					continue // another one has it
				}
				mu.Lock()
				if given[realm] || realm == 0 {
					t.Errorf("realm %d was given twice, or is the root's", realm)
				}
				given[realm] = true
				mu.Unlock()
				return
			}
		})
	}
	wg.Wait()
	if len(given) != wanted || !given[wanted] {
		t.Errorf("%d realms were given; want 1 to %d", len(given), wanted)
	}
}

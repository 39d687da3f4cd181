// Realms are nobody's twice.

package replica

import (
	"sync"
	"testing"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

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

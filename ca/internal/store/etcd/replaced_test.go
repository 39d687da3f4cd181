package etcd_test

// A store that is replaced, or put into another epoch, while somebody has it
// open.

import (
	"errors"
	"testing"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

func TestWhoeverHadTheStoreOpenWritesNothingIntoAnother(t *testing.T) {
	e := stage.StartEtcd(t, 1)
	cfg := config(e)
	for name, replace := range map[string]func(revision uint64) error{
		"another epoch": func(revision uint64) error { return etcd.NextEpoch(t.Context(), cfg, revision, 0) },
		"removed": func(uint64) error {
			e.Remove(cfg.Prefix)
			return nil
		},
		"another store": func(revision uint64) error {
			e.Remove(cfg.Prefix)
			return etcd.Import(t.Context(), cfg, store.NextEpoch(store.NextEpoch(revision)), each([]store.KV{{Key: "a", Value: []byte("theirs"), ModRevision: 1}}))
		},
	} {
		s := open(t, cfg)
		revision := put(t, s, "a", "ours")
		if res, err := s.Txn(t.Context(), []store.Cmp{{Key: "a", ModRevision: revision + 1}}, nil, nil); err != nil || res.Succeeded {
			t.Errorf("%s: before, a comparison that does not hold: %+v, %v", name, res, err)
		}
		if err := replace(revision); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for what, txn := range map[string]func() (store.TxnResult, error){
			"a write": func() (store.TxnResult, error) { return s.Txn(t.Context(), nil, []store.Op{store.Put("b", nil)}, nil) },
			"a probe": func() (store.TxnResult, error) { return s.Txn(t.Context(), nil, nil, nil) },
			"otherwise": func() (store.TxnResult, error) {
				return s.Txn(t.Context(), []store.Cmp{{Key: "a", ModRevision: 7}}, nil, []store.Op{store.Put("b", nil)})
			},
		} {
			if res, err := txn(); !errors.Is(err, store.ErrReplaced) {
				t.Errorf("%s: %s: %+v, %v; want ErrReplaced", name, what, res, err)
			}
		}
		now := open(t, cfg)
		if _, _, err := now.Get(t.Context(), "b"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s: the store that is there now has what was written: %v", name, err)
		}
		put(t, now, "b", "x")
		if _, err := now.Txn(t.Context(), nil, []store.Op{store.Delete("b")}, nil); err != nil {
			t.Errorf("%s: opened anew: %v", name, err)
		}
		if err := errors.Join(s.Close(), now.Close()); err != nil {
			t.Error(err)
		}
	}
}

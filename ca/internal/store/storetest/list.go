package storetest

// Listings.

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"merlon.dev/ca/internal/store"
)

func testList(t *testing.T, b Backend) {
	s := open(t, b)
	keys := []string{"a", "a/", "a/1", "a/1/x", "a/10", "a/2", "a/\xff", "a/\xff\xff", "a0", "b/1", "\x00", "\xff", "\xff\xff"}
	revision := make(map[string]uint64)
	for i := range keys {
		key := keys[(i*5)%len(keys)] // not in order
		revision[key] = write(t, s, store.Put(key, []byte("v"+key)))
	}
	write(t, s, store.Put("a/deleted", nil))
	latest := write(t, s, store.Delete("a/deleted"))
	for name, test := range map[string]struct {
		prefix, after string
		limit         int
		want          []string
		more          bool
	}{
		"all":                     {"", "", 100, []string{"\x00", "a", "a/", "a/1", "a/1/x", "a/10", "a/2", "a/\xff", "a/\xff\xff", "a0", "b/1", "\xff", "\xff\xff"}, false},
		"prefix":                  {"a/", "", 100, []string{"a/", "a/1", "a/1/x", "a/10", "a/2", "a/\xff", "a/\xff\xff"}, false},
		"prefix of bytes 0xff":    {"a/\xff", "", 100, []string{"a/\xff", "a/\xff\xff"}, false},
		"no such prefix":          {"c", "", 100, nil, false},
		"first page":              {"a/", "", 2, []string{"a/", "a/1"}, true},
		"next page":               {"a/", "a/1", 2, []string{"a/1/x", "a/10"}, true},
		"page that ends exactly":  {"a/", "a/2", 2, []string{"a/\xff", "a/\xff\xff"}, false},
		"after the last":          {"a/", "a/\xff\xff", 2, nil, false},
		"after an absent key":     {"a/", "a/100", 1, []string{"a/2"}, true},
		"after, below the prefix": {"b", "a", 9, []string{"b/1"}, false},
		"after, above the prefix": {"a/", "b", 9, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, at, more, err := s.List(within(t), test.prefix, test.after, test.limit, 0)
			if err != nil || at != latest || more != test.more {
				t.Fatalf("List = revision %d, more %v, %v; want %d, %v", at, more, err, latest, test.more)
			}
			var want []store.KV
			for _, key := range test.want {
				want = append(want, kv(key, "v"+key, revision[key]))
			}
			wantDiff(t, "List", got, want)
		})
	}
	if _, _, _, err := s.List(within(t), "", "", 0, 0); err == nil {
		t.Error("List with limit 0 was answered")
	}
}

// testPages lists while every key is rewritten, deleted and created again: all
// pages must show the state of one revision, in which every key has one value.
func testPages(t *testing.T, b Backend) {
	s := open(t, b)
	const keys = 20
	round := func(i int) (ops []store.Op) {
		for k := range keys {
			ops = append(ops, store.Put(numbered("k/", k), []byte(fmt.Sprint(i))))
		}
		return ops
	}
	write(t, s, round(0)...)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			for i := 1; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				ops := round(i*10 + w)
				if i%2 == 1 {
					ops = ops[:keys/2]
					for k := keys / 2; k < keys; k++ {
						ops = append(ops, store.Delete(numbered("k/", k)))
					}
				}
				if _, err := s.Txn(within(t), nil, ops, nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for complete := 0; complete < 20; {
		if listingIsOneRevision(t, s, keys) {
			complete++
		}
	}
	close(stop)
	wg.Wait()
}

// listingIsOneRevision pages through all keys; false: compacted on the way.
func listingIsOneRevision(t *testing.T, s store.Store, keys int) bool {
	t.Helper()
	var all []store.KV
	var after string
	var revision uint64
	for {
		page, at, more, err := s.List(within(t), "k/", after, 3, revision)
		if errors.Is(err, store.ErrCompacted) {
			return false
		}
		if err != nil || revision != 0 && at != revision {
			t.Fatalf("List = revision %d, %v; want %d", at, err, revision)
		}
		all, revision = append(all, page...), at
		if !more {
			break
		}
		after = page[len(page)-1].Key
	}
	if len(all) != keys && len(all) != keys/2 {
		t.Fatalf("listing at revision %d has %d keys; want %d or %d", revision, len(all), keys, keys/2)
	}
	for i, kv := range all {
		if kv.Key != numbered("k/", i) || string(kv.Value) != string(all[0].Value) || kv.ModRevision != all[0].ModRevision || kv.ModRevision > revision {
			t.Fatalf("listing at revision %d mixes revisions: %+v beside %+v", revision, kv, all[0])
		}
	}
	return true
}

func testListCompacted(t *testing.T, b Backend) {
	s := open(t, b)
	written := write(t, s, store.Put("a/1", nil), store.Put("a/2", nil))
	page, revision, more, err := s.List(within(t), "a/", "", 1, 0)
	if err != nil || len(page) != 1 || !more {
		t.Fatalf("List = %v, more %v, %v", page, more, err)
	}
	_, _, _, err = s.List(within(t), "a/", "", 1, revision+1000)
	wantError(t, "List of a future revision", err, store.ErrCompacted)
	b.Compact(t, s)
	_, _, _, err = s.List(within(t), "a/", "a/1", 1, revision)
	wantError(t, "List of a compacted revision", err, store.ErrCompacted)
	kvs, _ := listAll(t, s, "a/")
	wantDiff(t, "new listing", kvs, []store.KV{kv("a/1", "", written), kv("a/2", "", written)})
}

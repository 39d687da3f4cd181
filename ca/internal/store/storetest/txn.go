package storetest

// Single keys and transactions.

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"merlon.dev/ca/internal/store"
)

func testGet(t *testing.T, b Backend) {
	s := open(t, b)
	last := revisionOf(t, s)
	if last < 1 {
		t.Fatalf("Revision() of a new store = %d; want at least 1", last)
	}
	_, revision, err := s.Get(within(t), "a")
	wantError(t, "Get of an absent key", err, store.ErrNotFound)
	if revision != last {
		t.Fatalf("Get of an absent key said revision %d; want %d", revision, last)
	}
	for _, value := range []string{"one", "two", ""} {
		want := write(t, s, store.Put("a", []byte(value)))
		got, revision, err := s.Get(within(t), "a")
		if err != nil || revision != want || want <= last {
			t.Fatalf("Get(a) = revision %d, %v; want %d, above %d", revision, err, want, last)
		}
		last = want
		wantDiff(t, "Get(a)", got, kv("a", value, want))
	}
	write(t, s, store.Delete("a"))
	_, _, err = s.Get(within(t), "a")
	wantError(t, "Get of a deleted key", err, store.ErrNotFound)
}

func testOwnership(t *testing.T, b Backend) {
	s := open(t, b)
	value := []byte("before")
	after := revisionOf(t, s)
	written := write(t, s, store.Put("a", value))
	copy(value, "xxxxxx") // ours again once Txn has returned
	first, second := watch(t, s, "", after), watch(t, s, "", after)
	copy(next(t, first, 1)[0].Events[0].KV.Value, "xxxxxx")
	got, _, err := s.Get(within(t), "a")
	if err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "Get after the writer reused its slice", got, kv("a", "before", written))
	copy(got.Value, "xxxxxx")
	wantDiff(t, "second watch", next(t, second, 1)[0].Events[0].KV, kv("a", "before", written))
	got, _, err = s.Get(within(t), "a")
	if err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "Get after readers changed theirs", got, kv("a", "before", written))
}

func testCompare(t *testing.T, b Backend) {
	s := open(t, b)
	here := write(t, s, store.Put("here", []byte("v")))
	there := write(t, s, store.Put("there", []byte("v")))
	for name, test := range map[string]struct {
		cmps []store.Cmp
		want bool
	}{
		"no condition":             {nil, true},
		"exact":                    {[]store.Cmp{{Key: "here", ModRevision: here}}, true},
		"older":                    {[]store.Cmp{{Key: "here", ModRevision: here - 1}}, false},
		"newer":                    {[]store.Cmp{{Key: "here", ModRevision: here + 1}}, false},
		"absent, and it is":        {[]store.Cmp{{Key: "gone"}}, true},
		"absent, and it is not":    {[]store.Cmp{{Key: "here"}}, false},
		"present, and it is not":   {[]store.Cmp{{Key: "gone", ModRevision: here}}, false},
		"both":                     {[]store.Cmp{{Key: "here", ModRevision: here}, {Key: "there", ModRevision: there}}, true},
		"second fails":             {[]store.Cmp{{Key: "here", ModRevision: here}, {Key: "there", ModRevision: here}}, false},
		"key that begins like one": {[]store.Cmp{{Key: "her"}, {Key: "here2"}}, true},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := s.Txn(within(t), test.cmps,
				[]store.Op{store.Put("branch", []byte("then"))},
				[]store.Op{store.Put("branch", []byte("otherwise"))})
			if err != nil {
				t.Fatal(err)
			}
			want := store.TxnResult{Succeeded: test.want, Revision: revisionOf(t, s)}
			wantDiff(t, "Txn", res, want)
			branch := map[bool]string{true: "then", false: "otherwise"}[test.want]
			got, _, err := s.Get(within(t), "branch")
			if err != nil {
				t.Fatal(err)
			}
			wantDiff(t, "written", got, kv("branch", branch, res.Revision))
		})
	}
}

func testRevisions(t *testing.T, b Backend) {
	s := open(t, b)
	write(t, s, store.Put("a", nil))
	for name, test := range map[string]struct {
		ops   []store.Op
		rises bool
	}{
		"nothing":                {nil, false},
		"put":                    {[]store.Op{store.Put("b", nil)}, true},
		"two puts":               {[]store.Op{store.Put("b", nil), store.Put("c", nil)}, true},
		"same value again":       {[]store.Op{store.Put("a", nil)}, true},
		"delete of absent":       {[]store.Op{store.Delete("x")}, false},
		"delete of absent + put": {[]store.Op{store.Delete("x"), store.Put("b", nil)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			before := revisionOf(t, s)
			said := write(t, s, test.ops...)
			if said < before || test.rises != (said > before) {
				t.Fatalf("Txn said revision %d after %d; rises should be %v", said, before, test.rises)
			}
			if got := revisionOf(t, s); got != said {
				t.Fatalf("Revision() = %d after Txn said %d", got, said)
			}
		})
	}
	before := revisionOf(t, s)
	res, err := s.Txn(within(t), []store.Cmp{{Key: "a"}}, []store.Op{store.Put("z", nil)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	wantDiff(t, "Txn whose compare fails", res, store.TxnResult{Revision: before})
}

func testLimits(t *testing.T, b Backend) {
	s := open(t, b)
	last := write(t, s, store.Put("a", []byte("v")))
	big := bytes.Repeat([]byte("x"), store.MaxValueBytes)
	var many []store.Op
	for i := range store.MaxTxnOps + 1 {
		many = append(many, store.Put(numbered("k", i), nil))
	}
	tooLarge := map[string][]store.Op{
		"value": {store.Put("k", append(big, 'x'))},
		"key":   {store.Put(strings.Repeat("k", store.MaxKeyBytes+1), nil)},
		"sum":   {store.Put("k1", big), store.Put("k2", big)},
		"count": many,
	}
	for name, ops := range tooLarge {
		_, err := s.Txn(within(t), nil, ops, nil)
		wantError(t, "Txn with too large "+name, err, store.ErrTooLarge)
		_, err = s.Txn(within(t), nil, nil, ops)
		wantError(t, "Txn with otherwise too large "+name, err, store.ErrTooLarge)
	}
	_, err := s.Txn(within(t), nil, []store.Op{store.Put("k1", big)}, []store.Op{store.Put("k1", big)})
	wantError(t, "Txn whose branches are too large together", err, store.ErrTooLarge)
	for name, ops := range map[string][]store.Op{
		"empty key": {store.Put("", nil)},
		"key twice": {store.Put("k", nil), store.Delete("k")},
	} {
		if _, err := s.Txn(within(t), nil, ops, nil); err == nil {
			t.Errorf("Txn with %s was taken", name)
		}
	}
	if got := revisionOf(t, s); got != last {
		t.Fatalf("Revision() = %d after refusals only; want %d", got, last)
	}
}

func testLargest(t *testing.T, b Backend) {
	s := open(t, b)
	for round := range 3 { // the second round has large values before
		fill := []byte{byte('a' + round)}
		var wg sync.WaitGroup
		for _, ops := range [][]store.Op{
			{store.Put("big/1", bytes.Repeat(fill, store.MaxValueBytes)), store.Put("big/2", bytes.Repeat(fill, store.MaxTxnBytes-store.MaxValueBytes-10))},
			{store.Put("big/3", bytes.Repeat(fill, store.MaxValueBytes))},
		} {
			wg.Go(func() {
				if _, err := s.Txn(within(t), nil, ops, nil); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	s = reopen(t, b, s)
	kvs, _ := listAll(t, s, "big/")
	var sizes []int
	for _, kv := range kvs {
		if !bytes.Equal(kv.Value, bytes.Repeat([]byte("c"), len(kv.Value))) {
			t.Errorf("value of %s is not what was last written", kv.Key)
		}
		sizes = append(sizes, len(kv.Value))
	}
	wantDiff(t, "sizes", sizes, []int{store.MaxValueBytes, store.MaxTxnBytes - store.MaxValueBytes - 10, store.MaxValueBytes})
}

// testOneWinner is attack T6: one join token, used by many at once.
func testOneWinner(t *testing.T, b Backend) {
	s := open(t, b)
	for range 5 {
		revision := write(t, s, store.Put("token", []byte("secret")))
		var winners atomic.Int32
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				res, err := s.Txn(within(t), []store.Cmp{{Key: "token", ModRevision: revision}}, []store.Op{store.Delete("token")}, nil)
				if err != nil {
					t.Error(err)
				}
				if res.Succeeded {
					winners.Add(1)
				}
			})
		}
		wg.Wait()
		if got := winners.Load(); got != 1 {
			t.Fatalf("%d of 200 deleted the token; want 1", got)
		}
	}
}

func testCounter(t *testing.T, b Backend) {
	s := open(t, b)
	const writers, each = 12, 8
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if err := increment(t, s, "counter"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	got, _, err := s.Get(within(t), "counter")
	if err != nil || string(got.Value) != fmt.Sprint(writers*each) {
		t.Fatalf("counter = %s, %v; want %d", got.Value, err, writers*each)
	}
}

// increment adds one to a number, again and again until nobody came between.
func increment(t testing.TB, s store.Store, key string) error {
	for {
		now, _, err := s.Get(within(t), key)
		n := 0
		if err == nil {
			if n, err = strconv.Atoi(string(now.Value)); err != nil {
				return err
			}
		}
		res, err := s.Txn(within(t), []store.Cmp{{Key: key, ModRevision: now.ModRevision}},
			[]store.Op{store.Put(key, []byte(strconv.Itoa(n+1)))}, nil)
		if err != nil || res.Succeeded {
			return err
		}
	}
}

package crashtest

// What the writers and readers of a child do: random calls on a few contended
// keys, and unique keys beside them.

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"merlon.dev/ca/internal/store"
)

// The contended keys: g0/a … g5/d. A transaction stays within one group, so
// that a history is linearizable if the part of each group is.
const (
	groups       = 6
	keysPerGroup = 4
)

func groupPrefix(g int) string { return fmt.Sprintf("g%d/", g) }

func groupKey(g, k int) string { return groupPrefix(g) + string(rune('a'+k)) }

// cellOf is the inverse of groupKey; false for other keys.
func cellOf(key string) (g, k int, ok bool) {
	if len(key) != 4 || key[0] != 'g' || key[2] != '/' {
		return 0, 0, false
	}
	g, k = int(key[1]-'0'), int(key[3]-'a')
	return g, k, g >= 0 && g < groups && k >= 0 && k < keysPerGroup
}

// driver makes calls and reports them.
type driver struct {
	store store.Store
	rec   recorder
	life  life

	mu   sync.Mutex
	seen map[string]uint64 // guarded by mu; the ModRevision last seen of a key, for comparisons
}

func (d *driver) random(worker int) *rand.Rand {
	return rand.New(rand.NewPCG(d.life.Seed, uint64(worker))) //nolint:gosec // replayed by its seed
}

// write makes transactions until the store refuses all of them.
func (d *driver) write(ctx context.Context, worker int) {
	rng := d.random(worker)
	for n := 0; d.life.Calls == 0 || n < d.life.Calls; n++ {
		id := fmt.Sprintf("%d.%d.%d", d.life.Number, worker, n)
		if !d.do(ctx, id, d.transaction(rng, id, worker)) {
			return
		}
	}
}

// read lists and gets.
func (d *driver) read(ctx context.Context, worker int) {
	rng := d.random(worker)
	for n := 0; d.life.Calls == 0 || n < d.life.Calls; n++ {
		c := &call{Kind: kindGet, Key: groupKey(rng.IntN(groups), rng.IntN(keysPerGroup))}
		if rng.IntN(5) < 2 {
			c = &call{Kind: kindList, Key: groupPrefix(rng.IntN(groups))}
		}
		if !d.do(ctx, fmt.Sprintf("%d.%d.%d", d.life.Number, worker, n), c) {
			return
		}
		time.Sleep(time.Duration(rng.IntN(4_000)) * time.Microsecond) // the writers are what matters
	}
}

// transaction draws one.
func (d *driver) transaction(rng *rand.Rand, id string, worker int) *call {
	g := rng.IntN(groups)
	keys := rng.Perm(keysPerGroup)
	key := groupKey(g, keys[0])
	put := write{Key: key, Size: d.size(rng)}
	// Deletes carry no name; this does, so that the watch tells whose they were.
	mark := write{Key: fmt.Sprintf("last/%d", worker)}
	unique := write{Key: "u/" + id, Size: d.size(rng)}
	c := &call{Kind: kindTxn}
	switch p := rng.IntN(100); {
	case p < 20: // put
		c.Then = []write{put}
	case p < 40: // compare and put
		c.Cmps, c.Then = []store.Cmp{d.compare(key)}, []write{put}
	case p < 50: // create, unless it exists
		c.Cmps, c.Then = []store.Cmp{{Key: key}}, []write{put}
	case p < 58: // delete
		c.Then = []write{{Key: key, Delete: true}, mark}
	case p < 66: // compare and delete, or else leave a mark
		c.Cmps, c.Then, c.Otherwise = []store.Cmp{d.compare(key)}, []write{{Key: key, Delete: true}, unique}, []write{mark}
	case p < 80: // unique key
		c.Cmps, c.Then = []store.Cmp{{Key: unique.Key}}, []write{unique}
	default: // several keys
		c.Cmps = []store.Cmp{d.compare(key), d.compare(groupKey(g, keys[1]))}[:rng.IntN(3)]
		c.Then = []write{put, {Key: groupKey(g, keys[1]), Size: 3}, {Key: groupKey(g, keys[2]), Delete: rng.IntN(2) == 0}, unique}
		c.Otherwise = []write{{Key: groupKey(g, keys[3]), Size: 1}}[:rng.IntN(2)]
	}
	return c
}

func (d *driver) size(rng *rand.Rand) int {
	if d.life.Large > 0 && rng.IntN(d.life.Large) == 0 {
		return rng.IntN(100 << 10)
	}
	return rng.IntN(200)
}

func (d *driver) compare(key string) store.Cmp {
	d.mu.Lock()
	defer d.mu.Unlock()
	return store.Cmp{Key: key, ModRevision: d.seen[key]}
}

// do makes a call and reports it; false: the store is closed or broken.
func (d *driver) do(ctx context.Context, id string, c *call) bool {
	d.rec.say(line{What: lineInvoke, ID: id, Op: c})
	if d.life.Patience > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.life.Patience)
		defer cancel()
	}
	res, err := d.call(ctx, id, c)
	end := line{What: lineOK, ID: id, Result: res}
	if err != nil {
		end = line{What: lineUnknown, ID: id, Text: err.Error()}
		if errors.Is(err, store.ErrTooLarge) {
			end.What = lineFail
		}
	}
	d.rec.say(end)
	if err != nil {
		time.Sleep(20 * time.Millisecond) // errors would be all that is reported
	}
	return !errors.Is(err, store.ErrClosed)
}

func (d *driver) call(ctx context.Context, id string, c *call) (*result, error) {
	switch c.Kind {
	case kindTxn:
		res, err := d.store.Txn(ctx, c.Cmps, ops(id, branchThen, c.Then), ops(id, branchOtherwise, c.Otherwise))
		if err != nil {
			return nil, err
		}
		d.learn(c, res)
		return &result{Succeeded: res.Succeeded, Revision: res.Revision}, nil
	case kindGet:
		kv, revision, err := d.store.Get(ctx, c.Key)
		if errors.Is(err, store.ErrNotFound) {
			d.see(c.Key, 0)
			return &result{Revision: revision}, nil
		}
		if err != nil {
			return nil, err
		}
		d.see(c.Key, kv.ModRevision)
		return &result{Revision: revision, KVs: []pair{pairOf(kv)}}, nil
	default:
		kvs, revision, _, err := d.store.List(ctx, c.Key, "", keysPerGroup+1, 0)
		if err != nil {
			return nil, err
		}
		res := &result{Revision: revision}
		for _, kv := range kvs {
			d.see(kv.Key, kv.ModRevision)
			res.KVs = append(res.KVs, pairOf(kv))
		}
		return res, nil
	}
}

// learn remembers what a transaction wrote.
func (d *driver) learn(c *call, res store.TxnResult) {
	writes := c.Then
	if !res.Succeeded {
		writes = c.Otherwise
	}
	for _, w := range writes {
		if w.Delete {
			d.see(w.Key, 0)
		} else {
			d.see(w.Key, res.Revision)
		}
	}
}

func (d *driver) see(key string, revision uint64) {
	if _, _, ok := cellOf(key); !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen[key] = revision
}

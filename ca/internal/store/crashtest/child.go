// Package crashtest kills processes that use a store and looks at what is left.
//
// A child process drives a store with many writers, readers and watchers and
// reports each call before it begins and after it ends. Its parent, a test,
// kills it at random moments, starts it again, damages its files, or lets its
// syncs fail, and holds the recorded history against the promises of
// store.Store. README.md lists what is injected and what must hold.
package crashtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/store/etcd"
)

// lifeVariable holds a life as JSON in the environment of a child.
const lifeVariable = "MERLON_CRASH_LIFE"

// life is what a child is told to do.
type life struct {
	// Number tells lives of one history apart.
	Number int
	// Seed makes the calls of this life.
	Seed    uint64
	Target  target
	Watches []watchFrom
	// Writers and Readers work until the child is killed, or, if that is set,
	// until each has made so many Calls; then the child ends without closing the
	// store, which cannot be closed while all syncs fail.
	Writers, Readers, Calls int
	// Large lets one write in so many have a value of up to 100 KiB, so that
	// tables are written while the child lives. 0: none.
	Large int
	// Patience bounds one call; what is then not answered is unknown.
	Patience time.Duration
	// Folders are stores to inspect, one after the other, instead of driving
	// Target.
	Folders []string
	// Finish inspects Target: the watches up to its revision, then all keys.
	Finish bool
}

// target is a store: a folder of Badger, or a cluster of etcd.
type target struct {
	Dir             string
	KeepRevisions   uint64
	RecentRevisions int
	Etcd            etcd.Config
}

// watchFrom is a watch of a life. Its name stays the same when it is resumed in
// the next life.
type watchFrom struct {
	Name, Prefix string
	After        uint64
}

func (t target) clustered() bool { return len(t.Etcd.Endpoints) > 0 }

func (t target) open(ctx context.Context) (store.Store, error) {
	if t.clustered() {
		return etcd.Open(ctx, t.Etcd)
	}
	return badger.Open(t.Dir, badger.Options{KeepRevisions: t.KeepRevisions, RecentRevisions: t.RecentRevisions})
}

// IsChild tells whether this process was started as a child.
func IsChild() bool { return os.Getenv(lifeVariable) != "" }

// Child is the whole life of a child process; it returns its exit code.
func Child() int {
	var l life
	if err := json.Unmarshal([]byte(os.Getenv(lifeVariable)), &l); err != nil {
		fmt.Fprintln(os.Stderr, "child: read its life:", err)
		return 2
	}
	rec := recorder{os.Stdout}
	if len(l.Folders) > 0 {
		l.inspectFolders(rec)
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s, err := l.Target.open(ctx)
	if err != nil {
		rec.say(refusal(err))
		return 1
	}
	if l.Finish {
		err = l.finish(ctx, s, rec)
	} else {
		err = l.drive(context.Background(), s, rec)
		if l.Calls > 0 && err == nil {
			return 0
		}
	}
	if err = errors.Join(err, s.Close()); err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	rec.say(line{What: lineClosed})
	return 0
}

// refusal reports that a store did not open.
func refusal(err error) line {
	return line{What: lineRefused, Text: err.Error(), Typed: typed(err)}
}

// drive lets writers, readers and watchers work until the process is killed.
func (l life) drive(ctx context.Context, s store.Store, rec recorder) error {
	revision, err := s.Revision(ctx)
	if err != nil {
		return err
	}
	rec.say(line{What: lineOpen, Result: &result{Revision: revision}})
	d := driver{store: s, rec: rec, life: l, seen: make(map[string]uint64)}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg, watching sync.WaitGroup
	for _, w := range l.Watches {
		watching.Go(func() { follow(ctx, s, rec, w, 0) })
	}
	for n := range l.Writers {
		wg.Go(func() { d.write(ctx, n) })
	}
	for n := range l.Readers {
		wg.Go(func() { d.read(ctx, l.Writers+n) })
	}
	wg.Wait()
	cancel()
	watching.Wait()
	if l.Calls == 0 {
		return errors.New("all writers and readers gave up")
	}
	return nil
}

// follow reports a watch up to a revision; 0: for ever.
func follow(ctx context.Context, s store.Store, rec recorder, w watchFrom, until uint64) {
	if until > 0 && w.After >= until {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch, err := begin(ctx, s, w)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		rec.say(line{What: lineEnd, ID: w.Name, Text: err.Error()})
		return
	}
	for b := range ch {
		rec.say(line{What: lineBatch, Batch: batchOf(w.Name, b)})
		if until > 0 && b.Revision >= until {
			return
		}
	}
	if ctx.Err() == nil {
		rec.say(line{What: lineEnd, ID: w.Name, Text: "channel closed"})
	}
}

// begin begins a watch, again where the store could not be reached: while a
// leader hangs that is what must be said of it.
func begin(ctx context.Context, s store.Store, w watchFrom) (<-chan store.Batch, error) {
	for {
		ch, err := s.Watch(ctx, w.Prefix, w.After)
		if !errors.Is(err, store.ErrUnavailable) {
			return ch, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func batchOf(watch string, b store.Batch) *batch {
	out := &batch{Watch: watch, Revision: b.Revision, Events: make([]event, len(b.Events))}
	for i, e := range b.Events {
		out.Events[i] = event{Key: e.KV.Key, Delete: e.Delete}
		if !e.Delete {
			out.Events[i].Label = labelOf(e.KV.Key, e.KV.Value)
		}
		if e.Prev != nil {
			out.Events[i].Prev = labelOf(e.KV.Key, e.Prev)
		}
		if e.KV.ModRevision != b.Revision {
			out.Events[i].Label += fmt.Sprintf(" damaged revision %d", e.KV.ModRevision)
		}
	}
	return out
}

// finish writes one last key and reports everything that the store holds: the
// watches up to that key, then all keys.
func (l life) finish(ctx context.Context, s store.Store, rec recorder) error {
	id := fmt.Sprintf("%d.0.0", l.Number)
	c := &call{Kind: kindTxn, Then: []write{{Key: "finish"}}}
	rec.say(line{What: lineInvoke, ID: id, Op: c})
	res, err := s.Txn(ctx, nil, ops(id, branchThen, c.Then), nil)
	if err != nil {
		return err
	}
	rec.say(line{What: lineOK, ID: id, Result: &result{Succeeded: true, Revision: res.Revision}})
	for _, w := range l.Watches {
		follow(ctx, s, rec, w, res.Revision)
	}
	return reportAll(ctx, s, rec)
}

// reportAll lists all keys as one answer.
func reportAll(ctx context.Context, s store.Store, rec recorder) error {
	var (
		all      result
		after    string
		revision uint64
	)
	for more := true; more; {
		kvs, at, further, err := s.List(ctx, "", after, 1_000, revision)
		if err != nil {
			return err
		}
		for _, kv := range kvs {
			all.KVs = append(all.KVs, pairOf(kv))
			after = kv.Key
		}
		revision, more = at, further
	}
	all.Revision = revision
	rec.say(line{What: lineOpen, Result: &all})
	return nil
}

func pairOf(kv store.KV) pair {
	return pair{Key: kv.Key, Label: labelOf(kv.Key, kv.Value), Revision: kv.ModRevision}
}

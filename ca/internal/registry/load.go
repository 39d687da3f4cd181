// Listing the store: a page is read while those before it are decoded, and
// every tree is built in one go, because a CA with a million entries must be
// ready in seconds.

package registry

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/index"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/store"
)

const pageSize = 1000

// list reads the whole picture at one revision; the change says what was left
// out.
func list(ctx context.Context, st store.Store) (*picture, change, error) {
	for {
		pic, c, err := tryList(ctx, st)
		if errors.Is(err, store.ErrCompacted) && ctx.Err() == nil {
			continue // the store moved on under a long listing
		}
		return pic, c, err
	}
}

func tryList(ctx context.Context, st store.Store) (*picture, change, error) {
	l := &listing{store: st}
	all, c, err := l.entries(ctx)
	if err != nil {
		return nil, c, err
	}
	pic := &picture{entries: indexed(all), heads: make(map[string]*release.Head), replicas: replicas{byName: make(map[string]*replica.Record)}}
	for _, prefix := range kinds {
		if prefix == EntryPrefix {
			continue
		}
		err := l.pages(ctx, prefix, func(kvs []store.KV) error {
			for _, kv := range kvs {
				if err := pic.put(kv, nil, &c); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return nil, c, err
		}
	}
	pic.revision = l.revision
	return pic, c, nil
}

// listing is one walk over the store, all of one revision.
type listing struct {
	store    store.Store
	revision uint64 // 0 before the first page
}

// pages gives take each page under prefix.
func (l *listing) pages(ctx context.Context, prefix string, take func([]store.KV) error) error {
	for after, more := "", true; more; {
		var kvs []store.KV
		var err error
		kvs, l.revision, more, err = l.store.List(ctx, prefix, after, pageSize, l.revision)
		if err != nil {
			return fmt.Errorf("list %s: %w", prefix, err)
		}
		if err := take(kvs); err != nil {
			return err
		}
		if len(kvs) > 0 {
			after = kvs[len(kvs)-1].Key
		}
	}
	return nil
}

// entries reads all entries, in order of ID.
func (l *listing) entries(ctx context.Context) ([]*entry.Entry, change, error) {
	type page struct {
		number int
		kvs    []store.KV
	}
	var (
		c    change
		mu   sync.Mutex       // guards c and done
		done [][]*entry.Entry // by number of the page
	)
	group, ctx := errgroup.WithContext(ctx)
	pages := make(chan page, 2*runtime.GOMAXPROCS(0))
	group.Go(func() error {
		defer close(pages)
		n := 0
		return l.pages(ctx, EntryPrefix, func(kvs []store.KV) error {
			select {
			case pages <- page{n, kvs}:
				n++
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	})
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			var dec entry.Decoder
			for p := range pages {
				read, leftOut, err := decodePage(p.kvs, &dec)
				if err != nil {
					return err
				}
				mu.Lock()
				for len(done) <= p.number {
					done = append(done, nil)
				}
				done[p.number] = read
				c.leftOut = append(c.leftOut, leftOut...)
				mu.Unlock()
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, c, err
	}
	var all []*entry.Entry
	for _, read := range done {
		all = append(all, read...)
	}
	return all, c, nil
}

func decodePage(kvs []store.KV, dec *entry.Decoder) (read []*entry.Entry, leftOut []error, err error) {
	read = make([]*entry.Entry, 0, len(kvs))
	for _, kv := range kvs {
		e, err := decodeEntry(kv, dec)
		switch {
		case errors.Is(err, entry.ErrNewer):
			return nil, nil, err
		case err != nil:
			leftOut = append(leftOut, err)
		default:
			read = append(read, e)
		}
	}
	return read, leftOut, nil
}

// indexed builds each tree of all entries.
func indexed(all []*entry.Entry) entries {
	var s entries
	var building sync.WaitGroup
	build := func(tree *index.Tree[*entry.Entry], key func(*entry.Entry) index.Key, wanted func(*entry.Entry) bool) {
		building.Go(func() {
			items := make([]index.Item[*entry.Entry], 0, len(all))
			for _, e := range all {
				if wanted(e) {
					items = append(items, index.Item[*entry.Entry]{Key: key(e), Value: e})
				}
			}
			*tree = index.Build(items)
		})
	}
	building.Go(func() { s.federating = index.Build(federatingItems(all)) })
	every := func(*entry.Entry) bool { return true }
	build(&s.byID, func(e *entry.Entry) index.Key { return idKey(e.ID) }, every)
	build(&s.byParent, parentKey, every)
	build(&s.bySPIFFEID, nameKey, every)
	build(&s.byExpiry, expiryKey, func(e *entry.Entry) bool { return !e.ExpiresAt.IsZero() })
	build(&s.roles, nameKey, func(e *entry.Entry) bool { return e.Role.Name != "" })
	building.Wait()
	return s
}

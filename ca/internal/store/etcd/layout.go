package etcd

// The layout of the store in etcd: k/KEY are the store's keys, m/… is about
// the store itself. m/layout is written once, and again for a new epoch; it
// says which format the store has, and from where its revisions count. The
// highest epoch ever is remembered beside the prefix, where whoever removes the
// store to restore a backup does not remove it too.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
)

// format is that of the whole layout.
const format = 1

// keys makes etcd's keys.
type keys struct{ prefix string }

func (k keys) data(key string) string  { return k.prefix + "k/" + key }
func (k keys) layout() string          { return k.prefix + "m/layout" }
func (k keys) importing() string       { return k.prefix + "m/import" }
func (k keys) epoch() string           { return strings.TrimSuffix(k.prefix, "/") + ".epoch" }
func (k keys) strip(key []byte) string { return strings.TrimPrefix(string(key), k.data("")) }

// under returns the range of etcd's keys that begin with k/prefix.
func (k keys) under(prefix string) (from, end string) {
	from = k.data(prefix)
	return from, clientv3.GetPrefixRangeEnd(from)
}

// layoutRecord is the JSON in m/layout.
type layoutRecord struct {
	Format int `json:"format"`
	// Base is what the store's revisions have above etcd's.
	Base uint64 `json:"base"`
	// Past are the bases of earlier epochs, oldest first.
	Past []pastBase `json:"past,omitempty"`
	// Imported says that the store was filled by Import, so that it has keys
	// with revisions from before, and no history of them.
	Imported bool `json:"imported,omitempty"`
}

// pastBase was the base up to and including etcd's revision Until.
type pastBase struct {
	Base  uint64 `json:"base"`
	Until int64  `json:"until"`
}

// layout is where revisions count from.
type layout struct {
	layoutRecord
	// first is the store's revision when it was laid out: all that it has
	// written by itself lies above.
	first uint64
	// mod is etcd's ModRevision of m/layout: another one is another store, or
	// another epoch.
	mod int64
}

// revision returns the store's revision at one of etcd's.
func (l layout) revision(etcd int64) uint64 {
	for _, p := range l.Past {
		if etcd <= p.Until {
			return uint64(etcd) + p.Base
		}
	}
	return uint64(etcd) + l.Base
}

// native returns etcd's revision; 0 where there is none.
func (l layout) native(revision uint64) int64 {
	if revision < l.first {
		return 0
	}
	var after int64 // etcd's last revision of the epoch before
	for _, p := range l.Past {
		if revision <= uint64(p.Until)+p.Base {
			return nativeIn(revision, p.Base, after)
		}
		after = p.Until
	}
	return nativeIn(revision, l.Base, after)
}

// nativeIn returns etcd's revision under a base; 0 where that is not above
// after.
func nativeIn(revision, base uint64, after int64) int64 {
	if revision <= uint64(after)+base || revision-base > math.MaxInt64 {
		return 0
	}
	return int64(revision - base)
}

// openLayout reads the layout, and writes it into an empty prefix.
func (s *Store) openLayout(ctx context.Context) (l *layout, err error) {
	for range openTries {
		if l, err = s.tryLayout(ctx); !errors.Is(err, store.ErrUnavailable) {
			break
		}
	}
	return l, err
}

func (s *Store) tryLayout(ctx context.Context) (*layout, error) {
	for {
		l, seen, err := s.readLayout(ctx)
		if l != nil || err != nil {
			return l, err
		}
		if s.cfg.Existing {
			return nil, fmt.Errorf("%s: %w", s.keys.prefix, store.ErrNone)
		}
		record := layoutRecord{Format: format}
		if seen > 0 { // there was a store here before
			record.Base = store.NextEpoch(seen)
		}
		ops, err := s.putLayout(record, record.Base, seen)
		if err != nil {
			return nil, err
		}
		// Whoever else does the same at the same time writes the same.
		res, err := s.commit(ctx, s.nothingUnderPrefix(), ops, nil)
		switch {
		case err != nil:
			return nil, err
		case res.Succeeded:
			continue
		}
		if l, _, err = s.readLayout(ctx); l != nil || err != nil {
			return l, err
		}
		return nil, fmt.Errorf("there are keys under %s that are not a store's; give the CA a prefix of its own", s.keys.prefix)
	}
}

func (s *Store) nothingUnderPrefix() []clientv3.Cmp {
	return []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(s.keys.prefix).WithPrefix(), "=", 0)}
}

// putLayout writes the layout of a store that goes on above revision at, and
// remembers its epoch if it is higher than what was seen.
func (s *Store) putLayout(record layoutRecord, at, seen uint64) ([]clientv3.Op, error) {
	value, err := json.Marshal(record)
	if err != nil {
		return nil, err
	}
	key := s.keys.layout()
	ops := []clientv3.Op{clientv3.OpPut(key, encodeRecord(key, 0, value))}
	if store.Epoch(at) > store.Epoch(seen) {
		key := s.keys.epoch()
		ops = append(ops, clientv3.OpPut(key, encodeRecord(key, 0, strconv.AppendUint(nil, at, 10))))
	}
	return ops, nil
}

// readLayout returns nil where there is no store, and a revision of the highest
// epoch that any had here. A store of an earlier epoch is an error.
func (s *Store) readLayout(ctx context.Context) (*layout, uint64, error) {
	m, err := s.readMarks(ctx)
	if err != nil {
		return nil, 0, err
	}
	if err := s.members.sameCluster(m.cluster); err != nil {
		return nil, 0, fmt.Errorf("etcd endpoints: %v", err)
	}
	if m.importing {
		return nil, 0, fmt.Errorf("%s: %w, or is under way", s.keys.prefix, store.ErrUnfinished)
	}
	if m.laid == nil {
		return nil, m.seen, nil
	}
	l, err := s.decodeLayout(m.laid)
	if err != nil {
		return nil, 0, err
	}
	return &l, m.seen, store.CheckEpoch(l.revision(m.now), m.seen)
}

// marks are what is said about the store, at one revision.
type marks struct {
	laid      *mvccpb.KeyValue // m/layout; nil: there is none
	importing bool             // an import has begun and not ended
	seen      uint64           // of the highest epoch; 0: the first
	now       int64            // etcd's revision
	cluster   uint64
}

func (s *Store) readMarks(ctx context.Context) (m marks, err error) {
	var res *clientv3.TxnResponse
	err = s.read(ctx, "read the layout", func(ctx context.Context, c *clientv3.Client) (err error) {
		res, err = c.Txn(ctx).Then(clientv3.OpGet(s.keys.layout()), clientv3.OpGet(s.keys.importing()), clientv3.OpGet(s.keys.epoch())).Commit()
		return err
	})
	if err != nil {
		return m, err
	}
	m = marks{importing: len(rangeOf(res.Responses[1]).Kvs) > 0, now: res.Header.Revision, cluster: res.Header.ClusterId}
	if laid := rangeOf(res.Responses[0]).Kvs; len(laid) > 0 {
		m.laid = laid[0]
	}
	if seen := rangeOf(res.Responses[2]).Kvs; len(seen) > 0 {
		m.seen, err = decodeSeen(seen[0])
	}
	return m, err
}

func decodeSeen(kv *mvccpb.KeyValue) (uint64, error) {
	value, _, err := decodeRecord(string(kv.Key), kv.Value)
	if err != nil {
		return 0, err
	}
	seen, err := strconv.ParseUint(string(value), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %v", kv.Key, err)
	}
	return seen, nil
}

func (s *Store) decodeLayout(kv *mvccpb.KeyValue) (l layout, err error) {
	value, _, err := decodeRecord(string(kv.Key), kv.Value)
	if err != nil {
		return layout{}, err
	}
	if err := json.Unmarshal(value, &l.layoutRecord); err != nil {
		return layout{}, fmt.Errorf("read %s: %v", kv.Key, err)
	}
	if l.Format != format {
		return layout{}, fmt.Errorf("the store under %s has format %d, this version reads format %d", s.keys.prefix, l.Format, format)
	}
	l.first, l.mod = l.revision(kv.CreateRevision), kv.ModRevision
	return l, nil
}

func rangeOf(op *pb.ResponseOp) *pb.RangeResponse { return op.GetResponseRange() }

package etcd

// Transactions are etcd's: compares on its ModRevision, decided where all
// writes are ordered.

import (
	"context"
	"fmt"
	"math"

	clientv3 "go.etcd.io/etcd/client/v3"

	"merlon.dev/ca/internal/store"
)

// never is a ModRevision that no key has.
const never = math.MaxInt64

// Txn implements store.Store.
func (s *Store) Txn(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) (store.TxnResult, error) {
	if err := store.CheckTxn(cmps, then, otherwise); err != nil {
		return store.TxnResult{}, err
	}
	if err := s.enter(); err != nil {
		return store.TxnResult{}, err
	}
	defer s.leave()
	compares, err := s.compares(ctx, cmps)
	if err != nil {
		return store.TxnResult{}, err
	}
	res, err := s.commitHere(ctx, compares, s.ops(then), s.ops(otherwise))
	if err != nil {
		return store.TxnResult{}, err
	}
	return store.TxnResult{Succeeded: res.Succeeded, Revision: s.layout.revision(res.Header.Revision)}, nil
}

// commitHere is commit as long as the store is the one that was opened: who has
// another layout in mind would take revisions for what they are not. A
// transaction as large as etcd takes them leaves no room to ask; the next one
// does.
func (s *Store) commitHere(ctx context.Context, compares []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	at := s.keys.layout()
	here, look := compare(at, s.layout.mod), []clientv3.Op{clientv3.OpGet(at, clientv3.WithKeysOnly())}
	do := s.write
	if len(then)+len(otherwise) == 0 {
		do, then = s.read, look // as in commit
	}
	switch {
	case max(len(compares), len(then), len(otherwise)) == store.MaxTxnOps && len(otherwise) > 0, len(compares) == store.MaxTxnOps:
		return s.commit(ctx, compares, then, otherwise)
	case len(otherwise) > 0: // which must not be written elsewhere either
		res, err := s.transact(ctx, do, []clientv3.Cmp{here}, []clientv3.Op{clientv3.OpTxn(compares, then, otherwise)}, nil)
		if err != nil {
			return nil, err
		}
		if !res.Succeeded {
			return nil, errReplaced
		}
		inner := res.Responses[0].GetResponseTxn()
		return &clientv3.TxnResponse{Header: res.Header, Succeeded: inner.Succeeded, Responses: inner.Responses}, nil
	}
	res, err := s.transact(ctx, do, append(compares, here), then, look)
	if err != nil || res.Succeeded {
		return res, err
	}
	if found := rangeOf(res.Responses[0]).Kvs; len(found) == 0 || found[0].ModRevision != s.layout.mod {
		return nil, errReplaced
	}
	return res, nil
}

var errReplaced = fmt.Errorf("write to the store: %w", store.ErrReplaced)

// commit runs a transaction on etcd's own keys.
func (s *Store) commit(ctx context.Context, compares []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	do := s.write
	if len(then) == 0 && len(otherwise) == 0 {
		// etcd answers a transaction without operations from whatever state
		// the member has; a linearizable read makes it one.
		then = []clientv3.Op{clientv3.OpGet(s.keys.layout(), clientv3.WithCountOnly())}
		do = s.read
	}
	return s.transact(ctx, do, compares, then, otherwise)
}

func (s *Store) transact(ctx context.Context, do func(context.Context, string, ask) error, compares []clientv3.Cmp, then, otherwise []clientv3.Op) (res *clientv3.TxnResponse, err error) {
	err = do(ctx, "write to the store", func(ctx context.Context, c *clientv3.Client) (err error) {
		res, err = c.Txn(ctx).If(compares...).Then(then...).Else(otherwise...).Commit()
		return err
	})
	return res, err
}

func (s *Store) ops(ops []store.Op) []clientv3.Op {
	out := make([]clientv3.Op, len(ops))
	for i, op := range ops {
		if op.Delete {
			out[i] = clientv3.OpDelete(s.keys.data(op.Key))
		} else {
			out[i] = clientv3.OpPut(s.keys.data(op.Key), encodeRecord(op.Key, 0, op.Value))
		}
	}
	return out
}

// compares translates comparisons. etcd knows an imported key by the revision
// of the import, so such a key is read first: as long as etcd has not seen it
// change since, it has the ModRevision that it was imported with, and once it
// has changed it will never have it again. Reading and comparing thus are as
// good as one step.
func (s *Store) compares(ctx context.Context, cmps []store.Cmp) ([]clientv3.Cmp, error) {
	out := make([]clientv3.Cmp, len(cmps))
	var imported []int
	for i, c := range cmps {
		native := s.layout.native(c.ModRevision)
		switch {
		case c.ModRevision == 0:
		case native != 0:
		case s.layout.Imported && c.ModRevision < s.layout.first:
			imported = append(imported, i)
		default:
			native = never
		}
		out[i] = compare(s.keys.data(c.Key), native)
	}
	if len(imported) == 0 {
		return out, nil
	}
	natives, err := s.importedAt(ctx, cmps, imported)
	if err != nil {
		return nil, err
	}
	for n, i := range imported {
		out[i] = compare(s.keys.data(cmps[i].Key), natives[n])
	}
	return out, nil
}

func compare(key string, native int64) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "=", native)
}

// importedAt returns, for the comparisons with these indexes, etcd's
// ModRevision of the key that was imported with the compared one; never where
// the key is another by now.
func (s *Store) importedAt(ctx context.Context, cmps []store.Cmp, indexes []int) ([]int64, error) {
	gets := make([]clientv3.Op, len(indexes))
	for n, i := range indexes {
		gets[n] = clientv3.OpGet(s.keys.data(cmps[i].Key))
	}
	var res *clientv3.TxnResponse
	err := s.read(ctx, "read what is compared", func(ctx context.Context, c *clientv3.Client) (err error) {
		res, err = c.Txn(ctx).Then(gets...).Commit()
		return err
	})
	if err != nil {
		return nil, err
	}
	natives := make([]int64, len(indexes))
	for n, i := range indexes {
		natives[n] = never
		pairs := rangeOf(res.Responses[n]).Kvs
		if len(pairs) == 0 {
			continue
		}
		kv, err := s.keyValue(pairs[0])
		if err != nil {
			return nil, err
		}
		if kv.ModRevision == cmps[i].ModRevision {
			natives[n] = pairs[0].ModRevision
		}
	}
	return natives, nil
}

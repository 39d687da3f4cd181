// The book: proposals in the store, and which replicas want them.

package approval

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"merlon.dev/ca/internal/store"
)

const pageSize = 1000

// Propose stores an open proposal of t. Where the same person has proposed the same
// on the same basis it returns that one, so that who repeats a call has one
// proposal. It forgets proposals of which nobody asks any more.
func Propose(ctx context.Context, st store.Store, t Terms, now time.Time) (*Proposal, error) {
	p, err := New(t, now)
	if err != nil {
		return nil, err
	}
	op, err := p.put()
	if err != nil {
		return nil, err
	}
	all, err := List(ctx, st)
	if err != nil {
		return nil, err
	}
	ops, open := []store.Op{op}, 0
	for _, other := range all {
		switch {
		case other.stale(now):
			if len(ops) < store.MaxTxnOps {
				ops = append(ops, store.Delete(proposalPrefix+other.ID))
			}
		case other.Waits(now) != nil || other.By.Principal != t.By.Principal:
		case other.Method == t.Method && string(other.Request) == string(t.Request) && other.Basis == t.Basis && other.By.Name == t.By.Name:
			return other, nil
		default:
			open++
		}
	}
	if open >= maxOpen {
		return nil, &RefusedError{WhyTooMany, fmt.Sprintf("%s was not proposed: %d proposals of %s wait already", t.Act, open, t.By.Name)}
	}
	res, err := st.Txn(ctx, []store.Cmp{p.cmp()}, ops, nil)
	if err != nil {
		return nil, fmt.Errorf("store a proposal: %w", err)
	}
	if !res.Succeeded {
		return nil, errors.New("store a proposal: the random generator repeats itself")
	}
	p.Revision = res.Revision
	return p, nil
}

// List returns all proposals that are kept, oldest first.
func List(ctx context.Context, st store.Store) (all []*Proposal, err error) {
	revision := uint64(0)
	for after, more := "", true; more; {
		var kvs []store.KV
		if kvs, revision, more, err = st.List(ctx, proposalPrefix, after, pageSize, revision); err != nil {
			return nil, fmt.Errorf("list proposals: %w", err)
		}
		for _, kv := range kvs {
			p, err := Decode(kv)
			if err != nil {
				return nil, err
			}
			all, after = append(all, p), kv.Key
		}
	}
	slices.SortFunc(all, func(a, b *Proposal) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.ID, b.ID)) })
	return all, nil
}

// Read returns the proposal with the given ID; *RefusedError: there is none.
func Read(ctx context.Context, st store.Store, id string) (*Proposal, error) {
	unknown := &RefusedError{WhyUnknown, fmt.Sprintf("there is no proposal %.80q", id)}
	if !ValidID(id) {
		return nil, unknown
	}
	kv, _, err := st.Get(ctx, proposalPrefix+id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, unknown
	}
	if err != nil {
		return nil, fmt.Errorf("read proposal %s: %w", id, err)
	}
	return Decode(kv)
}

// End writes that p, which is open, was withdrawn or is void. Where somebody was
// faster it says what became of it.
func End(ctx context.Context, st store.Store, p *Proposal, to State, by, in, reason string, now time.Time) error {
	op, err := p.ended(to, by, in, reason).put()
	if err != nil {
		return err
	}
	res, err := st.Txn(ctx, []store.Cmp{p.cmp()}, []store.Op{op}, nil)
	if err != nil {
		return fmt.Errorf("end proposal %s: %w", p.ID, err)
	}
	if res.Succeeded {
		return nil
	}
	latest, err := Read(ctx, st, p.ID)
	if err != nil {
		return err
	}
	if err := latest.Waits(now); err != nil {
		return err
	}
	return ErrEnded
}

// Require puts down whether the named replica is configured to ask for a second
// administrator. Where one replica is, all do: a single administrator would go to
// the one that is not.
func Require(ctx context.Context, st store.Store, replica string, required bool) error {
	key := requiredPrefix + replica
	_, _, err := st.Get(ctx, key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("read %s: %w", key, err)
	}
	if there := err == nil; there == required {
		return nil
	}
	op := Forget(replica)
	if required {
		op = store.Put(key, nil)
	}
	if _, err := st.Txn(ctx, nil, []store.Op{op}, nil); err != nil {
		return fmt.Errorf("write %s: %w", key, err)
	}
	return nil
}

// Forget is the write after which the named replica, which is gone, asks for nobody.
func Forget(replica string) store.Op { return store.Delete(requiredPrefix + replica) }

// Required names a replica that is configured to ask for a second administrator;
// empty: none is.
func Required(ctx context.Context, st store.Store) (replica string, err error) {
	kvs, _, _, err := st.List(ctx, requiredPrefix, "", 1, 0)
	if err != nil {
		return "", fmt.Errorf("read which replicas ask for a second administrator: %w", err)
	}
	if len(kvs) == 0 {
		return "", nil
	}
	return kvs[0].Key[len(requiredPrefix):], nil
}

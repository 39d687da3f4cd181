// Nested CAs: replicas with a store of their own. Beside its record each has a
// realm, by which serial numbers and revocations name its store, and what it
// said last of those who count below it.

package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

const (
	// RealmKey is where the store keeps the realm that was given out last.
	RealmKey = "realm"
	// ProgressPrefix is where the store keeps what nested CAs said, by name.
	ProgressPrefix = "nested/"
)

// ErrNoRealm is returned when every realm has been given out.
var ErrNoRealm error = status.Errorf(codes.ResourceExhausted, "every realm has been given to a nested CA, and none is given twice: %d in the life of a trust domain", svid.MaxRealm)

// Nested says whether the replica has a store of its own.
func (r *Record) Nested() bool { return r.Realm != 0 }

// NextRealm returns a realm that nobody had, with what takes it: of two who want
// it, one gets it.
func NextRealm(ctx context.Context, st store.Store) (uint32, store.Cmp, store.Op, error) {
	kv, last, err := lastRealm(ctx, st)
	if err != nil {
		return 0, store.Cmp{}, store.Op{}, err
	}
	if last >= svid.MaxRealm {
		return 0, store.Cmp{}, store.Op{}, ErrNoRealm
	}
	next := last + 1
	return next, store.Cmp{Key: RealmKey, ModRevision: kv.ModRevision}, putRealm(next), nil
}

// SkipRealms takes those that can have been given out without a trace in the store:
// up to given, and some above.
func SkipRealms(ctx context.Context, st store.Store, given uint32) error {
	for {
		kv, last, err := lastRealm(ctx, st)
		if err != nil {
			return err
		}
		res, err := st.Txn(ctx, []store.Cmp{{Key: RealmKey, ModRevision: kv.ModRevision}}, []store.Op{putRealm(skip(last, given))}, nil)
		if err != nil || res.Succeeded {
			return err
		}
	}
}

// PutSkipped is SkipRealms for a store that is about to be made, in which kv is what
// it would keep at RealmKey.
func PutSkipped(kv store.KV, given uint32) (store.Op, error) {
	last, err := realmIn(kv)
	return putRealm(skip(last, given)), err
}

// maxSkipped is how many realms are skipped each time: more than are given out
// between two backups.
const maxSkipped = 16

// skip is what counts as given out last. Half of what is left at least can still be
// given.
func skip(last, given uint32) uint32 {
	last = min(max(last, given), svid.MaxRealm)
	return last + min(maxSkipped, (svid.MaxRealm-last)/2)
}

func lastRealm(ctx context.Context, st store.Store) (store.KV, uint32, error) {
	kv, _, err := st.Get(ctx, RealmKey)
	if errors.Is(err, store.ErrNotFound) {
		return store.KV{}, 0, nil
	}
	if err != nil {
		return kv, 0, fmt.Errorf("read the last realm: %w", err)
	}
	last, err := realmIn(kv)
	return kv, last, err
}

// realmIn is what kv says, 0 where nothing is stored.
func realmIn(kv store.KV) (uint32, error) {
	if kv.Key == "" {
		return 0, nil
	}
	last, err := strconv.ParseUint(string(kv.Value), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("read the last realm: %w", err)
	}
	return uint32(last), nil
}

func putRealm(last uint32) store.Op {
	return store.Put(RealmKey, strconv.AppendUint(nil, uint64(last), 10))
}

// Progress is how far those are who count below a nested CA. It is immutable.
type Progress struct {
	Name string
	// TrustSequence is that of the trust bundle that all of them serve.
	TrustSequence uint64
	// Behind are the SPIFFE IDs of agents that do not serve the newest one yet.
	Behind []string
}

type storedProgress struct {
	Version       int      `json:"v"`
	TrustSequence uint64   `json:"trust_sequence"`
	Behind        []string `json:"behind,omitempty"`
}

// Put returns the write that stores p.
func (p *Progress) Put() (store.Op, error) {
	b, err := json.Marshal(storedProgress{encodingVersion, p.TrustSequence, p.Behind})
	if err != nil {
		return store.Op{}, fmt.Errorf("encode the progress of nested CA %s: %w", p.Name, err)
	}
	return store.Put(ProgressPrefix+p.Name, b), nil
}

// DecodeProgress reads what is stored. Beside an error it returns one that serves
// nothing: what cannot be read holds steps back.
func DecodeProgress(kv store.KV) (*Progress, error) {
	p := &Progress{Name: kv.Key[len(ProgressPrefix):]}
	var s storedProgress
	if err := json.Unmarshal(kv.Value, &s); err != nil {
		return p, fmt.Errorf("decode %s: %w", kv.Key, err)
	}
	if s.Version != encodingVersion {
		return p, fmt.Errorf("decode %s: version %d is not known", kv.Key, s.Version)
	}
	p.TrustSequence, p.Behind = s.TrustSequence, s.Behind
	return p, nil
}

package crashtest

// Looking into store folders that were damaged: opened, read whole, written
// once, closed, and read again.

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
)

// typed tells whether an error is one that a program can recognize as "this
// store has lost something".
func typed(err error) bool {
	_, ok := errors.AsType[*badger.DamagedError](err)
	return ok
}

// inspectFolders reports one case for each folder.
func (l life) inspectFolders(rec recorder) {
	for _, dir := range l.Folders {
		rec.say(line{What: lineCase, ID: dir})
		l.inspect(dir, rec)
	}
}

func (l life) inspect(dir string, rec recorder) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for round := range 2 { // what was written to damaged files must be readable too
		s, err := badger.Open(dir, badger.Options{KeepRevisions: l.Target.KeepRevisions})
		if err != nil {
			rec.say(refusal(err))
			return
		}
		res, text := digests(ctx, s)
		rec.say(line{What: lineOpen, Result: &res, Text: text})
		if round == 0 {
			_, err = s.Txn(ctx, nil, []store.Op{store.Put("after the damage", []byte("x"))}, nil)
		}
		if closed := s.Close(); err != nil || closed != nil {
			rec.say(line{What: lineFail, Text: fmt.Sprint(err, closed)})
			return
		}
		rec.say(line{What: lineClosed})
	}
}

// digests reads the whole history and all keys. Each revision comes with the
// hash of the history so far; text says what does not fit together.
func digests(ctx context.Context, s store.Store) (res result, text string) {
	revision, err := s.Revision(ctx)
	if err != nil {
		return res, err.Error()
	}
	res.Revision = revision
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch, err := s.Watch(ctx, "", 1)
	if err != nil {
		return res, err.Error()
	}
	state := make(map[string]pair)
	var sum [sha256.Size]byte
	for last := uint64(1); last < revision; {
		b, open := <-ch
		if !open {
			return res, fmt.Sprintf("the watch ended after revision %d of %d", last, revision)
		}
		out := batchOf("", b)
		told, _ := json.Marshal(out) //nolint:errchkjson // strings and numbers
		sum = sha256.Sum256(append(sum[:], told...))
		for _, e := range out.Events {
			if e.Delete {
				delete(state, e.Key)
			} else {
				state[e.Key] = pair{e.Key, e.Label, b.Revision}
			}
		}
		last = b.Revision
		res.KVs = append(res.KVs, pair{Label: hex.EncodeToString(sum[:8]), Revision: last})
	}
	return res, agrees(ctx, s, state, revision)
}

// agrees says where the keys are not what the history adds up to; empty: they
// are.
func agrees(ctx context.Context, s store.Store, state map[string]pair, revision uint64) string {
	rest := maps.Clone(state)
	var after string
	for more := true; more; {
		kvs, _, further, err := s.List(ctx, "", after, 1_000, revision)
		if err != nil {
			return err.Error()
		}
		for _, kv := range kvs {
			if got := pairOf(kv); state[kv.Key] != got {
				return fmt.Sprintf("listed %+v, watched %+v", got, state[kv.Key])
			}
			delete(rest, kv.Key)
			after = kv.Key
		}
		more = further
	}
	for key := range state {
		kv, _, err := s.Get(ctx, key)
		if err != nil || pairOf(kv) != state[key] {
			return fmt.Sprintf("got %+v, %v; watched %+v", pairOf(kv), err, state[key])
		}
	}
	for _, kv := range rest {
		return fmt.Sprintf("listed nothing, watched %+v", kv)
	}
	return ""
}

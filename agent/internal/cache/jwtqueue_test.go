package cache

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"merlon.dev/ca/capb"
)

// slowCA answers each call after a second; an item whose entry ID is "bad" is
// refused, and the token of any other is its entry ID.
type slowCA struct {
	Authority

	mu    sync.Mutex
	calls [][]string // entry IDs of each
	err   error
}

func (s *slowCA) SignJWT(ctx context.Context, items []*capb.SignJWTItem) (results []*capb.SignJWTResult, err error) {
	var ids []string
	for _, item := range items {
		ids = append(ids, item.GetEntryId())
		r := &capb.SignJWTResult{Token: item.GetEntryId()}
		if item.GetEntryId() == "bad" {
			r = &capb.SignJWTResult{Code: int32(codes.PermissionDenied), Message: "no such entry"}
		}
		results = append(results, r)
	}
	s.mu.Lock()
	s.calls = append(s.calls, ids)
	err = s.err
	s.mu.Unlock()
	select {
	case <-time.After(time.Second):
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return results, err
}

// asks runs ask for each ID, in order, and returns what each got.
func (q *jwtQueue) asks(ctx context.Context, ids ...string) []string {
	got := make([]string, len(ids))
	var all sync.WaitGroup
	for i, id := range ids {
		all.Go(func() {
			token, err := q.ask(ctx, &capb.SignJWTItem{EntryId: id})
			got[i] = fmt.Sprint(token, " ", status.Code(err))
		})
		synctest.Wait() // so that they come in this order
	}
	all.Wait()
	return got
}

func TestJWTRequestsThatComeMeanwhileTravelTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := &slowCA{}
		q := &jwtQueue{authority: ca}
		got := q.asks(t.Context(), "a", "b", "bad", "c")
		if want := []string{"a OK", "b OK", " PermissionDenied", "c OK"}; !slices.Equal(got, want) {
			t.Errorf("answers %q; want %q", got, want)
		}
		if len(ca.calls) != 2 || !slices.Equal(ca.calls[0], []string{"a"}) || !slices.Equal(ca.calls[1], []string{"b", "bad", "c"}) {
			t.Errorf("calls %q; want the first alone and then the others together", ca.calls)
		}
		ca.calls = nil
		if got := q.asks(t.Context(), "d"); got[0] != "d OK" || len(ca.calls) != 1 {
			t.Errorf("%q in %d calls after the queue was empty", got, len(ca.calls))
		}
	})
}

func TestJWTBatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := &slowCA{}
		q := &jwtQueue{authority: ca}
		ids := make([]string, 2*maxJWTBatch+2)
		for i := range ids {
			ids[i] = fmt.Sprint(i)
		}
		for i, got := range q.asks(t.Context(), ids...) {
			if want := ids[i] + " OK"; got != want {
				t.Errorf("%q; want %q", got, want)
			}
		}
		var sizes []int
		for _, call := range ca.calls {
			sizes = append(sizes, len(call))
		}
		if !slices.Equal(sizes, []int{1, maxJWTBatch, maxJWTBatch, 1}) {
			t.Errorf("calls of %v items; want 1, %d, %d, 1", sizes, maxJWTBatch, maxJWTBatch)
		}
	})
}

// A call that fails, fails for all in it, and for nobody else.
func TestFailedJWTCallFailsItsOwnRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := &slowCA{err: status.Error(codes.Unavailable, "away")}
		q := &jwtQueue{authority: ca}
		time.AfterFunc(1500*time.Millisecond, func() { // a has failed, b and c are on their way
			ca.mu.Lock()
			defer ca.mu.Unlock()
			ca.err = nil
		})
		if got, want := q.asks(t.Context(), "a", "b", "c"), " Unavailable"; !slices.Equal(got, []string{want, want, want}) {
			t.Errorf("answers %q; want all Unavailable", got)
		}
		if got := q.asks(t.Context(), "d"); got[0] != "d OK" {
			t.Errorf("d got %q", got[0])
		}
	})
}

// Whoever gives up takes nothing from the others: neither the turn that he was
// given nor the call that he makes for them.
func TestWhoGivesUpAJWTRequestDelaysNobody(t *testing.T) {
	type request struct{ comesAfter, patience time.Duration }
	rapid.Check(t, func(rt *rapid.T) {
		requests := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) request {
			return request{
				time.Duration(rapid.IntRange(0, 1000).Draw(rt, "comes after")) * time.Millisecond,
				time.Duration(rapid.IntRange(1, 4000).Draw(rt, "patience")) * time.Millisecond,
			}
		}), 1, 8).Draw(rt, "requests")
		synctest.Test(t, func(t *testing.T) {
			q := &jwtQueue{authority: &slowCA{}}
			var all sync.WaitGroup
			for i, r := range requests {
				all.Go(func() {
					time.Sleep(r.comesAfter)
					ctx, cancel := context.WithTimeout(t.Context(), r.patience)
					defer cancel()
					id, began := fmt.Sprint(i), time.Now()
					token, err := q.ask(ctx, &capb.SignJWTItem{EntryId: id})
					// One call may be under way, and the next is with it.
					if took := time.Since(began); took > 2*time.Second || err == nil && token != id || err != nil && took < r.patience {
						t.Errorf("%s got %q, %v after %s, with patience for %s", id, token, err, took, r.patience)
					}
				})
			}
			all.Wait()
			if q.sending || len(q.waiting) > 0 {
				t.Errorf("the queue is not empty: sending %v, %d wait", q.sending, len(q.waiting))
			}
		})
	})
}

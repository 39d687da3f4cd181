// Whoever starts many large programs is waited for by nobody but himself.

package workload

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestOneUserHashesOneProgramAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many, other = 1000, 1001
		h := newHashes()
		began := make(chan func(), 100)
		for range 100 {
			go func() {
				done, err := h.begin(t.Context(), many)
				if err != nil {
					t.Error(err)
					return
				}
				began <- done
			}()
		}
		synctest.Wait()
		if n := len(began); n != 1 {
			t.Errorf("%d of one user's programs are hashed at the same time; want 1", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		done, err := h.begin(ctx, other)
		if err != nil {
			t.Fatalf("another user waits for him: %v", err)
		}
		done()
		// Both slots are taken, and one who gives up takes nothing with him.
		if done, err = h.begin(ctx, other); err != nil {
			t.Fatal(err)
		}
		if _, err := h.begin(ctx, 1002); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a third user begins: %v; want that he waits", err)
		}
		done()
		for range 100 {
			(<-began)()
		}
		if len(h.turns) != 0 || len(h.slots) != 0 {
			t.Errorf("%d users and %d slots are not free in the end", len(h.turns), len(h.slots))
		}
	})
}

// Whoever starts many large programs is waited for by nobody but himself.

package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
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

// changing changes a file each time that it is asked whether it has ended.
type changing struct {
	context.Context
	path string
}

func (c changing) Err() error {
	_ = os.Chtimes(c.path, time.Now(), time.Now().Add(-time.Hour))
	return nil
}

// A digest of a program that is written to while it is read is of nothing that
// ever was.
func TestProgramThatChangesWhileItIsReadHasNoDigest(t *testing.T) {
	program := copyOf(t, t.TempDir(), "program")
	p := startPeer(t, program)
	dir, err := os.Open(fmt.Sprintf("/proc/%d", p.peer.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	exe, err := statExe(int(dir.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if sum, err := hashExe(t.Context(), int(dir.Fd()), exe); err != nil || len(sum) != 64 {
		t.Fatalf("hashExe() = %q, %v; want a digest", sum, err)
	}
	if sum, err := hashExe(changing{t.Context(), program}, int(dir.Fd()), exe); err == nil {
		t.Errorf("hashExe() = %q for a program that changed; want none", sum)
	}
}

// Who waits for the disk, in a strict log and in an async one.

package audit

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestAsyncDoesNotWaitForTheDisk, and what is on its way when the log is closed
// is there; refusals wait all the same.
func TestAsyncDoesNotWaitForTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l, err := Open(path, Options{Async: true})
	if err != nil {
		t.Fatal(err)
	}
	hold := make(chan struct{})
	l.sync = func(f *os.File) error { <-hold; return f.Sync() }
	for range 100 {
		if err := l.Issue(t.Context(), Record{Type: Issue}); err != nil {
			t.Fatal(err)
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := l.Issue(short, Record{Type: Refuse}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a refusal did not wait: %v", err)
	}
	close(hold)
	closeLog(t, l)
	wantVerified(t, path, 101)
}

// TestStrictWaitsForTheDisk: an SVID leaves when its record is synced.
func TestStrictWaitsForTheDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := openLog(t, path)
	hold := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l.sync = func(f *os.File) error { cancel(); <-hold; return f.Sync() }
	if err := l.Issue(ctx, Record{Type: Issue}); !errors.Is(err, context.Canceled) {
		t.Errorf("an SVID did not wait: %v", err)
	}
	close(hold)
	if err := l.Issue(t.Context(), Record{Type: Issue}); err != nil {
		t.Error(err)
	}
	closeLog(t, l)
	wantVerified(t, path, 2)
}

func TestAsyncLogThatFailedTakesNothing(t *testing.T) {
	l := openLog(t, filepath.Join(t.TempDir(), "audit.jsonl"))
	l.opts.Async = true
	eio := errors.New("input/output error")
	l.sync = func(*os.File) error { return eio }
	if err := l.Append(t.Context(), Record{Type: Issue}); !errors.Is(err, eio) {
		t.Fatal(err)
	}
	if err := l.Issue(t.Context(), Record{Type: Issue}); !errors.Is(err, eio) {
		t.Fatalf("Issue after a failed sync = %v", err)
	}
}

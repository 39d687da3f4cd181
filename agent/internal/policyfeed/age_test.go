// T28: a policy that nobody confirms does not stay unnoticed, and denies where that is
// configured.

package policyfeed

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/engine"
)

// page is what is written, safe for concurrent use.
type page struct {
	mu   sync.Mutex
	text bytes.Buffer // guarded by mu
}

func (p *page) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

// take is what was written since the last take.
func (p *page) take() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.text.Reset()
	return p.text.String()
}

// aging is a feed with generation 1 in use.
func aging(t *testing.T, heard func() time.Time, out *page) *Feed {
	t.Helper()
	e, err := engine.New(t.Context(), engine.Source{Generation: 1})
	if err != nil {
		t.Fatal(err)
	}
	f := &Feed{
		cfg: Config{
			Name: "main", Heard: heard, StaleAfter: time.Minute, MaxAge: time.Hour,
			Logger: slog.New(slog.NewTextHandler(out, nil)), OnChange: func() {},
		},
		announced: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	f.now.Store(&Snapshot{Active: e})
	return f
}

func announced(generation uint64) *capb.PolicyBundle {
	return &capb.PolicyBundle{Name: "main", Generation: generation}
}

func TestAgeOfThePolicyIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out page
		var heard atomic.Pointer[time.Time]
		hear := func() { now := time.Now(); heard.Store(&now) }
		hear()
		f := aging(t, func() time.Time { return *heard.Load() }, &out)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); f.watchAge(ctx) }()
		said := func(want string) {
			t.Helper()
			synctest.Wait()
			if got := out.take(); want == "" && got != "" || !strings.Contains(got, want) || strings.Count(got, "\n") > 1 {
				t.Errorf("said %q; want %q, once", got, want)
			}
		}
		time.Sleep(time.Minute)
		said("")
		time.Sleep(time.Minute)
		said("policy is stale")
		time.Sleep(30 * time.Minute)
		said("")
		time.Sleep(30 * time.Minute)
		said("policy is too old")
		hear()
		time.Sleep(lookEvery)
		said("in force again")
		cancel()
		<-done
	})
}

// A CA that is heard, but whose bundle does not come, confirms nothing.
func TestPolicyAgesWhileAnotherIsAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := aging(t, time.Now, new(page))
		f.Announce(announced(1))
		begun := time.Now()
		time.Sleep(2 * time.Hour)
		if s := f.stageAt(time.Now()); s != fresh || !f.AsOf().Equal(time.Now()) {
			t.Errorf("confirmed by the CA: stage %d as of %s", s, f.AsOf())
		}
		since := time.Now()
		f.Announce(announced(2))
		time.Sleep(30 * time.Minute)
		f.Announce(announced(3)) // nothing new about the one in use
		if s := f.stageAt(time.Now()); s != stale || !f.AsOf().Equal(since) {
			t.Errorf("another is announced: stage %d as of %s; want that of %s after %s", s, f.AsOf(), since, begun)
		}
		time.Sleep(time.Hour)
		if s := f.stageAt(time.Now()); s != tooOld {
			t.Errorf("for long: stage %d", s)
		}
		f.Announce(announced(1)) // the CA has gone back to it
		if s := f.stageAt(time.Now()); s != fresh {
			t.Errorf("confirmed again: stage %d", s)
		}
		f.now.Store(&Snapshot{})
		f.cfg.Heard = func() time.Time { return time.Time{} }
		if s := f.stageAt(time.Now()); s != fresh {
			t.Errorf("without a policy: stage %d", s)
		}
	})
}

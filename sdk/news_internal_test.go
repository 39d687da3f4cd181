// Whose announcement counts, and for how long what is at hand decides meanwhile.

package sdk

import (
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestAnAnnouncementCountsWhileItsAgentIsThere(t *testing.T) {
	const soon = lag - time.Millisecond
	type step struct {
		do   string // "hear", "arrive", "gone", "wait"
		v    uint64
		wait time.Duration
		want bool // decides, after it
	}
	for name, steps := range map[string][]step{
		"nothing is announced": {{do: "wait", wait: time.Hour, want: true}},
		"it comes in time":     {{do: "hear", v: 8, want: true}, {do: "wait", wait: soon, want: true}, {do: "arrive", v: 8, want: true}, {do: "wait", wait: time.Hour, want: true}},
		"it came before":       {{do: "arrive", v: 8, want: true}, {do: "hear", v: 8, want: true}, {do: "wait", wait: time.Hour, want: true}},
		"it does not come":     {{do: "hear", v: 8, want: true}, {do: "wait", wait: lag, want: false}, {do: "wait", wait: time.Hour, want: false}},
		"it comes late":        {{do: "hear", v: 8, want: true}, {do: "wait", wait: lag, want: false}, {do: "arrive", v: 8, want: true}},
		"others are announced in its place": {
			{do: "hear", v: 8, want: true},
			{do: "wait", wait: soon, want: true},
			{do: "hear", v: 9, want: true},
			{do: "wait", wait: time.Millisecond, want: false},
			{do: "hear", v: 10, want: false},
		},
		"one comes, and the next does not": {
			{do: "hear", v: 8, want: true},
			{do: "wait", wait: soon, want: true},
			{do: "hear", v: 9, want: true},
			{do: "arrive", v: 8, want: true},
			{do: "wait", wait: soon, want: true},
			{do: "wait", wait: time.Millisecond, want: false},
		},
		"the agent goes first": {
			{do: "hear", v: 8, want: true},
			{do: "wait", wait: soon, want: true},
			{do: "gone", want: true},
			{do: "wait", wait: time.Hour, want: true},
			{do: "hear", v: 20, want: true},
			{do: "wait", wait: lag, want: false},
			{do: "arrive", v: 20, want: true},
		},
		"the agent goes afterwards": {
			{do: "hear", v: 8, want: true},
			{do: "wait", wait: lag, want: false},
			{do: "gone", want: false},
			{do: "wait", wait: time.Hour, want: false},
			{do: "hear", v: 20, want: false},
			{do: "gone", want: false},
			{do: "arrive", v: 20, want: true},
		},
		"the agent goes, and nothing was announced": {{do: "gone", want: true}, {do: "wait", wait: time.Hour, want: true}},
	} {
		t.Run(name, func(t *testing.T) {
			var n news
			now := time.Now()
			n.arrive(7)
			n.hear(7, now)
			for i, s := range steps {
				switch s.do {
				case "hear":
					n.hear(s.v, now)
				case "arrive":
					n.arrive(s.v)
				case "gone":
					n.gone(now)
				case "wait":
					now = now.Add(s.wait)
				}
				if got := n.decides(now); got != s.want {
					t.Fatalf("step %d (%s): decides %t; want %t", i, s.do, got, s.want)
				}
			}
		})
	}
}

// saying is an announcement as the model of the property remembers it: for good.
type saying struct {
	version   uint64
	from, end time.Time // end: when its stream ended; zero: it lives
}

// Whatever agents announce, send and do not send, and whenever they go: what is at hand
// decides unless an agent that lived on for lag had announced another and not sent it;
// and where it decides no more, nothing but another that comes changes that.
func TestOfNewsNothingButTheNewPolicyLetsTheOldOneDecideAgain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var n news
		now, have, next := time.Now(), uint64(1), uint64(2)
		n.arrive(have)
		var said []saying
		open := map[int]bool{}
		expected := func() bool {
			for _, s := range said {
				end := now
				if !s.end.IsZero() {
					end = s.end
				}
				if s.version > have && end.Sub(s.from) >= lag {
					return false
				}
			}
			return true
		}
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			before := n.decides(now)
			arrived := false
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0: // never more than are told apart
				if len(open) < maxAwaited {
					n.hear(next, now)
					said = append(said, saying{version: next, from: now})
					open[len(said)-1] = true
					next++
				}
			case 1:
				if v := rapid.Uint64Range(have, next-1).Draw(t, "version"); v > have {
					n.arrive(v)
					have, arrived = v, true
				}
			case 2:
				n.gone(now)
				for i := range open {
					said[i].end = now
				}
				clear(open)
			case 3:
				now = now.Add(time.Duration(rapid.Int64Range(1, int64(lag)).Draw(t, "wait")))
			}
			if got, want := n.decides(now), expected(); got != want {
				t.Fatalf("version %d decides: %t; want %t after %v", have, got, want, said)
			}
			if !before && n.decides(now) && !arrived {
				t.Fatalf("version %d decides again, and nothing has come", have)
			}
		}
	})
}

// More announcements than are told apart make what is at hand end sooner, not later.
func TestManyAnnouncementsAreNotForgotten(t *testing.T) {
	var n news
	now := time.Now()
	n.arrive(1)
	for v := uint64(2); v < 10*maxAwaited; v++ {
		n.hear(v, now)
		now = now.Add(time.Millisecond)
	}
	if len(n.awaited) != maxAwaited {
		t.Errorf("%d announcements are kept; want %d", len(n.awaited), maxAwaited)
	}
	n.arrive(10*maxAwaited - 2)
	if n.since.Load() == 0 {
		t.Error("the last announcement is forgotten")
	}
	n.arrive(10*maxAwaited - 1)
	if n.since.Load() != 0 || !n.decides(now.Add(time.Hour)) {
		t.Error("the version that was announced last does not decide")
	}
}

// How old the policy at hand is and that it came are told by two streams, in either order
// and at once: it is never older than what was heard of it.
func TestWhatArrivesIsAsOldAsWasHeard(t *testing.T) {
	for range 1000 {
		var n news
		var both sync.WaitGroup
		both.Go(func() { n.hear(1, time.Now()); n.hearAsOf(7) })
		both.Go(func() { n.arrive(1) })
		both.Wait()
		if got := n.asOf.Load(); got != 7 {
			t.Fatalf("as of %d; want 7", got)
		}
	}
	var n news
	n.arrive(1)
	n.hear(2, time.Now())
	n.hearAsOf(9)
	if got := n.asOf.Load(); got != 0 {
		t.Errorf("while another is awaited: as of %d; want 0", got)
	}
	if n.arrive(2); n.asOf.Load() != 9 {
		t.Errorf("once it is here: as of %d; want 9", n.asOf.Load())
	}
}

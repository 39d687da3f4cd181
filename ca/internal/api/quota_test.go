// Shares of agents: no agent gets more than the bound over any time, and none
// that asks for less is ever refused.

package api

import (
	"math"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"
)

// allowed is what an agent with so many entries may have in any d.
func allowed(base, entries int, d time.Duration) float64 {
	return (float64(base) + float64(entries)/20) * (60 + d.Seconds())
}

// Over every stretch of time an agent has at most a minute's worth and what comes
// back meanwhile, whatever it asks for and when; and what it is told to wait for is
// there then.
func TestNoAgentGetsMoreThanItsShare(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base, entries := rapid.IntRange(10, 1000).Draw(t, "base"), rapid.IntRange(0, 50_000).Draw(t, "entries")
		q, s := newQuota(base), &share{}
		type taken struct {
			at time.Time
			n  int
		}
		var all []taken
		now := time.Unix(1_800_000_000, 0)
		for range rapid.IntRange(1, 60).Draw(t, "calls") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(20*time.Second)).Draw(t, "pause")))
			n := rapid.IntRange(1, 500).Draw(t, "items")
			for range rapid.IntRange(1, 30).Draw(t, "times") {
				wait := q.take(s, n, now, func() int { return entries })
				if wait > 0 {
					if early := now.Add(wait / 2); wait > time.Millisecond && q.take(s, n, early, func() int { return entries }) == 0 {
						t.Fatalf("after half of the wait of %s there is enough", wait)
					}
					now = now.Add(wait + time.Microsecond)
					if again := q.take(s, n, now, func() int { return entries }); again > 0 {
						t.Fatalf("told to wait for %s, and then for %s", wait, again)
					}
				}
				all = append(all, taken{now, n})
			}
		}
		for i := range all {
			sum := 0.0
			for _, call := range all[i:] {
				sum += float64(call.n)
				if most := allowed(base, entries, call.at.Sub(all[i].at)); sum > most+0.01 {
					t.Fatalf("%v SVIDs within %s; want at most %v", sum, call.at.Sub(all[i].at), most)
				}
			}
		}
	})
}

// A node that starts asks for an SVID for each of its entries at once, in calls of
// a hundred, and again when it is restarted, and when a tainted key is replaced.
func TestNodeThatStartsIsNeverRefused(t *testing.T) {
	for _, entries := range []int{0, 1, 100, 10_000, 100_000} {
		q, s, now := newQuota(10), &share{}, time.Unix(1_800_000_000, 0)
		for range 3 {
			for asked := 0; asked < entries; asked += 100 {
				if wait := q.take(s, min(100, entries-asked), now, func() int { return entries }); wait > 0 {
					t.Fatalf("%d entries: the call after %d SVIDs waits for %s", entries, asked, wait)
				}
			}
		}
	}
}

// Entries that come later count as well, and are counted once a second at most.
func TestShareGrowsWithTheEntries(t *testing.T) {
	q, s, now := newQuota(10), &share{}, time.Unix(1_800_000_000, 0)
	entries, counted := 0, 0
	take := func(n int) time.Duration {
		return q.take(s, n, now, func() int { counted++; return entries })
	}
	if wait := take(600); wait != 0 {
		t.Fatalf("a minute's worth: wait %s", wait)
	}
	if wait := take(1); wait != 100*time.Millisecond {
		t.Errorf("one more: wait %s; want 100ms", wait)
	}
	entries = 10_000
	now = now.Add(countInterval)
	if wait := take(10_000); wait != 0 || counted != 2 {
		t.Errorf("10 000 entries more: wait %s, counted %d times; want no wait, 2", wait, counted)
	}
	for range 100 {
		take(50_000)
	}
	if counted != 2 {
		t.Errorf("counted %d times within a second; want 2", counted)
	}
	entries = 0
	now = now.Add(countInterval)
	if wait := take(30_000); wait < 10*time.Minute || counted != 3 {
		t.Errorf("the entries are gone: wait %s, counted %d times", wait, counted)
	}
}

// Whoever comes late to the lock gives nothing back twice.
func TestEarlierCallsGiveNothingBack(t *testing.T) {
	var s spent
	now := time.Unix(1_800_000_000, 0)
	s.take(500, 10, now)
	for range 100 {
		if s.take(1, 10, now.Add(-time.Minute)) > 0 {
			t.Fatal("a call from a minute ago does not get what is there")
		}
	}
	if left := s.left(10, now); math.Abs(left-600) > 0.001 {
		t.Errorf("%v are spent; want 600", left)
	}
	if s.take(1, 10, now.Add(-time.Minute)) == 0 {
		t.Error("a call from a minute ago gets what has not come back")
	}
}

func BenchmarkQuota(b *testing.B) {
	s := &Service{quota: newQuota(1_000_000)}
	id, now := spiffeid.RequireFromString("spiffe://shop.test/agent/n1"), time.Now()
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Microsecond)
		if s.quota.take(s.quota.of(id), 1, now, func() int { return 0 }) > 0 {
			b.Fatal("refused")
		}
	}
}

func TestRefusalSaysWhyAndWhenToAskAgain(t *testing.T) {
	st := status.Convert(overspent("spiffe://shop.test/agent/n1", 2*time.Second))
	var reason string
	var wait time.Duration
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			reason = d.GetReason()
		case *errdetails.RetryInfo:
			wait = d.GetRetryDelay().AsDuration()
		}
	}
	if st.Code() != codes.ResourceExhausted || reason != "ISSUE_QUOTA" || wait != 2*time.Second {
		t.Errorf("%v, reason %s, retry after %s", st, reason, wait)
	}
}

// What comes at the wrong moment: half a listing, a revocation on the way, a
// clock that jumped.

package cache

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

func TestNothingIsSaidBeforeTheFirstListingIsComplete(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		s := f.Subscribe()
		defer s.Close()
		proved := []string{"unix:uid:1"}
		s.View(proves(proved...), true)
		half := &capb.SyncResponse{Reset_: true, TrustBundle: f.trust(1), Entries: []*capb.Entry{newEntry("e2", "/second", "unix:uid:1")}}
		f.ca.set(func(c *signer) { c.ids["e2"] = "spiffe://" + td + "/second" })
		if err := f.Apply(t.Context(), half); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if v := s.View(proves(proved...), true); len(v.Entries) != 0 || v.Current {
			t.Errorf("View() = %+v with half a listing; want nothing, and not current", v)
		}
		if entries, current := f.Entitled(proves(proved...)); len(entries) != 0 || current {
			t.Errorf("Entitled() = %d entries, current=%t with half a listing; want none, false", len(entries), current)
		}
		f.apply(&capb.SyncResponse{Entries: []*capb.Entry{newEntry("e1", "/first", "unix:uid:1")}})
		if v := take(t, s, proved...); paths(v) != "/first /second" {
			t.Errorf("SVIDs = %q after the listing; want /first /second", paths(v))
		}
	})
}

// A CA that says when to ask again is not asked sooner than half of that, though
// never forgotten.
func TestCAThatAsksToBeLeftAloneIs(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		st, err := status.New(codes.ResourceExhausted, "a share is used up").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		f.ca.set(func(c *signer) { c.err = fmt.Errorf("sign: %w", st.Err()) })
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		asked := func() (n int) {
			f.ca.set(func(c *signer) { n = len(c.requests) })
			return n
		}
		time.Sleep(lastRetry/2 - time.Second)
		if n := asked(); n != 1 {
			t.Errorf("asked %d times at first; want once", n)
		}
		f.ca.set(func(c *signer) { c.err = nil })
		time.Sleep(2 * lastRetry)
		if v := s.View(proves("unix:uid:1"), true); paths(v) != "/a" {
			t.Errorf("SVIDs = %q when there are more; want /a", paths(v))
		}
	})
}

func TestRevocationOvertakesAnSVIDOnItsWay(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		s.View(proves("unix:uid:1"), true)
		made := take(t, s, "unix:uid:1").SVIDs[0]

		// The same answer again, accepted before the revocation, settled after.
		f.mu.Lock()
		sl := f.slots[slotKey{"e1", nil}]
		sl.withdraw()
		sl.ordered, sl.outdated = true, false
		f.mu.Unlock()
		f.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/a"}, BeforeRevision: f.revision + 1,
			ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		}}})
		f.ca.set(func(c *signer) { c.revision = f.revision + 1 })
		f.settle(t.Context(), want{slot: sl, entry: made.Entry}, made, nil)
		f.mu.Lock()
		served := sl.svid
		f.mu.Unlock()
		if served == made {
			t.Error("an SVID that was revoked on its way is served")
		}
	})
}

// A machine that sleeps: the wall clock goes on, timers do not.
func TestLateTimersAreCaughtUpWith(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		e := newEntry("e2", "/b", "unix:uid:2")
		e.ExpiresAt = timestamppb.New(time.Now().Add(50 * time.Minute))
		f.sync(newEntry("e1", "/a", "unix:uid:1"), e)
		s, gone := f.Subscribe(), f.Subscribe()
		defer s.Close()
		defer gone.Close()
		s.View(proves("unix:uid:1"), true)
		take(t, s, "unix:uid:1")
		gone.View(proves("unix:uid:2"), true)
		take(t, gone, "unix:uid:2")
		f.mu.Lock()
		f.slots[slotKey{"e1", nil}].stopTimer()
		f.slots[slotKey{"e2", nil}].stopTimer()
		f.expiries["e2"].Stop()
		f.mu.Unlock()
		before := f.ca.count()
		time.Sleep(50*time.Minute + lookInterval)
		if v := take(t, s, "unix:uid:1"); f.ca.count() == before || len(v.SVIDs) != 1 {
			t.Errorf("%d requests, %d SVIDs; want the one that is due", f.ca.count()-before, len(v.SVIDs))
		}
		if v := take(t, gone, "unix:uid:2"); len(v.Entries) != 0 {
			t.Error("an expired entry stands because its timer is late")
		}
	})
}

// A CA that knows less than the node: one that was set back, one that is cut
// off from its store, one that has not caught up, and one that was restored
// and says so.

package cache

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

// held lists what a workload of user 1 would get.
func (f *fixture) held() (paths string) {
	entries, _ := f.Entitled(proves("unix:uid:1"))
	for _, e := range entries {
		paths += e.SPIFFEID.Path()
	}
	return paths
}

// say applies m as it is, in a state that holds /a and /b at revision 100.
func at100(t *testing.T, f func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error)) {
	t.Helper()
	run(t, func(t *testing.T, fix *fixture) {
		fix.revision = 99
		fix.sync(newEntry("e1", "/a", "unix:uid:1"), newEntry("e2", "/b", "unix:uid:1"))
		fix.apply(&capb.SyncResponse{Revocations: []*capb.Revocation{{
			Subject: &capb.Revocation_SpiffeId{SpiffeId: "spiffe://" + td + "/thief"}, BeforeRevision: 9,
			ExpiresAt: timestamppb.New(time.Now().Add(100 * time.Hour)),
		}}})
		fix.Disconnected()
		time.Sleep(time.Minute)
		f(t, fix, func(m *capb.SyncResponse) error { return fix.Apply(t.Context(), m) })
	})
}

func (f *fixture) unchanged(t *testing.T, heard time.Time) {
	t.Helper()
	if got := f.held(); got != "/a/b" {
		t.Errorf("entries = %s; want /a/b", got)
	}
	if got := len(f.Revocations().All()); got != 1 {
		t.Errorf("%d revocations; want the 1 that was known", got)
	}
	if got := f.State(); got.Revision != 101 || !got.Heard.Equal(heard) {
		t.Errorf("revision %d, heard %v; want 101, %v: nothing new was heard", got.Revision, got.Heard, heard)
	}
	if got := f.Resume(); got != 101 {
		t.Errorf("Resume() = %d; want 101", got)
	}
}

func TestOlderListingIsRefused(t *testing.T) {
	at100(t, func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error) {
		heard := f.Heard()
		// In two messages: only the second one says how old it is.
		if err := say(&capb.SyncResponse{Reset_: true, Entries: []*capb.Entry{newEntry("e1", "/old", "unix:uid:1")}}); err != nil {
			t.Fatal(err)
		}
		err := say(&capb.SyncResponse{Revision: 100, Synced: true, Entries: []*capb.Entry{newEntry("e3", "/c", "unix:uid:1")}})
		if older, ok := errors.AsType[*OlderError](err); !ok || older.Revision != 100 || older.Seen != 101 {
			t.Errorf("Apply(an older listing) = %v; want *OlderError", err)
		}
		f.unchanged(t, heard)
		if f.State().Connected {
			t.Error("an older CA counts as connected")
		}
	})
}

func TestOlderListingIsRefusedAfterARestart(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.Remember(101, time.Time{})
		m := &capb.SyncResponse{Reset_: true, Revision: 100, Synced: true, TrustBundle: f.trust(1), Entries: []*capb.Entry{newEntry("e1", "/a", "unix:uid:1")}}
		if _, ok := errors.AsType[*OlderError](f.Apply(t.Context(), m)); !ok || f.State().Synced || f.held() != "" || !f.Heard().IsZero() {
			t.Errorf("an older listing was taken: %+v", f.State())
		}
		// A replica that cannot reach its store is not to blame, and no better.
		m.Stale = true
		if err := f.Apply(t.Context(), m); !errors.Is(err, ErrBehind) || f.State().Synced || f.held() != "" {
			t.Errorf("Apply(an older listing of a stale CA) = %v, %+v; want ErrBehind", err, f.State())
		}
		if f.Seen() != 101 || f.Resume() != 0 {
			t.Errorf("seen %d, resume %d; want 101, 0", f.Seen(), f.Resume())
		}
	})
}

func TestStaleCADoesNotMakeThePictureFresher(t *testing.T) {
	at100(t, func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error) {
		heard := f.Heard()
		older := &capb.SyncResponse{Reset_: true, Synced: true, Stale: true, Revision: 90, Entries: []*capb.Entry{newEntry("e1", "/old", "unix:uid:1")}}
		if err := say(older); !errors.Is(err, ErrBehind) {
			t.Errorf("Apply(an older listing) = %v; want ErrBehind", err)
		}
		f.unchanged(t, heard)
		for _, m := range []*capb.SyncResponse{
			{Synced: true, Stale: true, Revision: 90},
			{Synced: true, Stale: true, Revision: 101},
		} {
			if err := say(m); err != nil {
				t.Fatal(err)
			}
			f.unchanged(t, heard)
		}
		s := f.Subscribe()
		defer s.Close()
		if v := s.View(proves("unix:uid:2"), true); v.Current || !f.State().Stale {
			t.Error("that there is no entry counts as certain, although the CA cannot reach its store")
		}
		if err := say(&capb.SyncResponse{Synced: true, Revision: 101}); err != nil {
			t.Fatal(err)
		}
		if v := take(t, s, "unix:uid:2"); !v.Current || f.State().Stale || !f.Heard().After(heard) {
			t.Error("the CA reaches its store again, and the picture is not current")
		}
	})
}

// What a nested CA passes on is as old as what it heard last from the CA above.
func TestPictureIsAsOldAsTheWordFromAbove(t *testing.T) {
	at100(t, func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error) {
		heard := f.Heard()
		for _, age := range []time.Duration{time.Hour, 10 * 365 * 24 * time.Hour} {
			if err := say(&capb.SyncResponse{Synced: true, Revision: 101, UpstreamAge: durationpb.New(age)}); err != nil {
				t.Fatal(err)
			}
			if !f.Heard().Equal(heard) || f.State().Stale || f.State().Revision != 101 {
				t.Errorf("a message whose sender has heard nothing for %s: heard %s, %+v; want %s as before, and its content taken", age, f.Heard(), f.State(), heard)
			}
		}
		now := time.Now()
		if err := say(&capb.SyncResponse{Synced: true, Revision: 101, UpstreamAge: durationpb.New(time.Millisecond)}); err != nil {
			t.Fatal(err)
		}
		if got := f.Heard(); !got.After(heard) || got.After(now.Add(time.Minute)) {
			t.Errorf("heard %s; want it to go on from %s", got, heard)
		}
		// Nobody makes a picture fresher than now.
		if err := say(&capb.SyncResponse{Synced: true, Revision: 101, UpstreamAge: durationpb.New(-time.Hour)}); err != nil {
			t.Fatal(err)
		}
		if got := f.Heard(); got.After(time.Now()) {
			t.Errorf("heard %s, which is to come", got)
		}
	})
}

// The other replica is behind by a moment: what it sends is known here.
func TestReplicaThatCatchesUpTakesNothingBack(t *testing.T) {
	at100(t, func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error) {
		heard := f.Heard()
		old := newEntry("gone", "/gone", "unix:uid:1") // deleted at 98
		old.Revision = 97
		for _, m := range []*capb.SyncResponse{
			{Synced: true, Revision: 95},
			{Synced: true, Revision: 97, Entries: []*capb.Entry{old}},
			{Synced: true, Revision: 98, RemovedEntryIds: []string{"e2"}}, // made again at 99
		} {
			if err := say(m); err != nil {
				t.Fatal(err)
			}
			f.unchanged(t, heard)
		}
		if err := say(&capb.SyncResponse{Synced: true, Revision: 102, RemovedEntryIds: []string{"e1"}}); err != nil {
			t.Fatal(err)
		}
		if f.held() != "/b" || !f.Heard().After(heard) {
			t.Errorf("entries = %s, heard %v; want /b, now", f.held(), f.Heard())
		}
	})
}

func TestHalfAnUpdateThatWasCutOffHasNoEffect(t *testing.T) {
	at100(t, func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error) {
		if err := say(&capb.SyncResponse{RemovedEntryIds: []string{"e1", "e2"}}); err != nil {
			t.Fatal(err)
		}
		if f.held() != "/a/b" {
			t.Errorf("entries = %s in the middle of an update; want /a/b", f.held())
		}
		f.Disconnected()
		if err := say(&capb.SyncResponse{Synced: true, Revision: 102}); err != nil {
			t.Fatal(err)
		}
		if f.held() != "/a/b" {
			t.Errorf("entries = %s after an update that was cut off; want /a/b", f.held())
		}
	})
}

func TestNextEpochNeedsAListing(t *testing.T) {
	const restored = 1<<epochBits | 7
	at100(t, func(t *testing.T, f *fixture, say func(*capb.SyncResponse) error) {
		heard := f.Heard()
		err := say(&capb.SyncResponse{Synced: true, Revision: restored, RemovedEntryIds: []string{"e1"}})
		if !errors.Is(err, ErrNewEpoch) || f.held() != "/a/b" || f.Resume() != 0 || !f.Heard().Equal(heard) {
			t.Errorf("Apply(changes in the next epoch) = %v, entries %s, Resume() = %d; want a refusal, /a/b, 0", err, f.held(), f.Resume())
		}
		if err := say(&capb.SyncResponse{Reset_: true, Synced: true, Revision: restored, Entries: []*capb.Entry{newEntry("e2", "/b", "unix:uid:1")}}); err != nil {
			t.Fatal(err)
		}
		if f.held() != "/b" || f.Resume() != restored || f.Seen() != restored {
			t.Errorf("entries %s, Resume() = %d, seen %d; want /b, %d twice", f.held(), f.Resume(), f.Seen(), restored)
		}
		// And back: the restored CA was exchanged for the old one.
		for _, m := range []*capb.SyncResponse{{Synced: true, Revision: 101}, {Reset_: true, Synced: true, Revision: 101}} {
			if _, ok := errors.AsType[*OlderError](say(m)); !ok {
				t.Errorf("Apply(%v) in the next epoch was taken", m)
			}
		}
		synctest.Wait()
	})
}

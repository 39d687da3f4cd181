// Streams that want some of their workload's SVIDs, and not for ever.

package cache

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"merlon.dev/ca/capb"
)

func TestOnlyWantedSVIDsAreMadeAndRenewed(t *testing.T) {
	run(t, func(t *testing.T, f *fixture) {
		f.sync(newEntry("e1", "/a", "unix:uid:1"), newEntry("e2", "/b", "unix:uid:1"))
		s := f.Subscribe()
		defer s.Close()
		view := func(paths ...string) View {
			v := s.ViewOf(proves("unix:uid:1"), func(all []*Entry) (wanted []*Entry) {
				for _, e := range all {
					if slices.Contains(paths, e.SPIFFEID.Path()) {
						wanted = append(wanted, e)
					}
				}
				return wanted
			})
			synctest.Wait()
			return v
		}
		view("/b")
		if v := view("/b"); paths(v) != "/b" || len(v.Entries) != 2 || v.Pending {
			t.Errorf("SVIDs = %q of %d entries, pending %v; want /b of 2", paths(v), len(v.Entries), v.Pending)
		}
		if view(); f.ca.count() != 1 {
			t.Errorf("%d requests; want 1, for /b alone", f.ca.count())
		}
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if f.ca.count() != 1 || len(f.slots) != 0 {
			t.Errorf("%d requests and %d slots after nothing was wanted for a day; want 1 and 0", f.ca.count(), len(f.slots))
		}
		f.apply(&capb.SyncResponse{RemovedEntryIds: []string{"e2"}})
		view("/b")
		if v := view("/b"); paths(v) != "" || f.ca.count() != 1 {
			t.Errorf("SVIDs = %q after %d requests; want none for an entry that is gone", paths(v), f.ca.count())
		}
	})
}

// What a resuming stream reads back, and what it must not pass over.

package registry

import (
	"testing"

	"merlon.dev/ca/internal/store"
)

// An agent that resumes over such a removal must get a full listing.
func TestRemovalThatCannotBeReadIsNotPassedOver(t *testing.T) {
	removed := func(key string, prev []byte) store.Batch {
		return store.Batch{Revision: 7, Events: []store.Event{{Delete: true, KV: store.KV{Key: key, ModRevision: 7}, Prev: prev}}}
	}
	for name, tt := range map[string]struct {
		batch store.Batch
		want  bool
	}{
		"unreadable":    {removed(EntryPrefix+"x", []byte("{}")), false},
		"was not there": {removed(EntryPrefix+"x", nil), true},
		"no entry":      {removed("token/x", []byte("{}")), true},
	} {
		if got, ok := appendRemovals(nil, tt.batch); ok != tt.want || len(got) != 0 {
			t.Errorf("%s: appendRemovals() = %v, %t; want none, %t", name, got, ok, tt.want)
		}
	}
}

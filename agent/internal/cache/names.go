// The SPIFFE IDs of the node as one sorted list, for those who ask for all of them each
// time the policy changes: entries that come and go cost it themselves, not all the
// others. Those that have an end are looked at each time, as a clock can be set.

package cache

import (
	"maps"
	"slices"
	"time"
)

// names are what the entries are that were added and not removed. It is not safe for
// concurrent use.
type names struct {
	lasting map[string]int      // SPIFFE ID → entries without an end
	ending  map[*Entry]struct{} // with one
	changed map[string]struct{} // IDs of lasting entries that came or went since list was made
	list    []string            // of lasting, sorted; replaced, never written to
}

func newNames() names {
	return names{lasting: map[string]int{}, ending: map[*Entry]struct{}{}, changed: map[string]struct{}{}}
}

func (n *names) add(e *Entry) {
	if !e.ExpiresAt.IsZero() {
		n.ending[e] = struct{}{}
		return
	}
	n.count(e.SPIFFEID.String(), 1)
}

func (n *names) remove(e *Entry) {
	if !e.ExpiresAt.IsZero() {
		delete(n.ending, e)
		return
	}
	n.count(e.SPIFFEID.String(), -1)
}

func (n *names) count(id string, by int) {
	if n.lasting[id] += by; n.lasting[id] == 0 {
		delete(n.lasting, id)
	}
	n.changed[id] = struct{}{}
}

// at are the IDs of the entries that hold at now. The caller must not write to it.
func (n *names) at(now time.Time) []string {
	if len(n.changed) > 0 {
		var come []string
		for id := range n.changed {
			if n.lasting[id] > 0 {
				come = append(come, id)
			}
		}
		slices.Sort(come)
		stayed := slices.DeleteFunc(slices.Clone(n.list), func(id string) bool { _, changed := n.changed[id]; return changed })
		n.list = merged(stayed, come)
		clear(n.changed)
	}
	ending := make(map[string]struct{})
	for e := range n.ending {
		if id := e.SPIFFEID.String(); !e.Expired(now) && n.lasting[id] == 0 {
			ending[id] = struct{}{}
		}
	}
	return merged(n.list, slices.Sorted(maps.Keys(ending)))
}

// merged are two sorted lists as one, or one of them where the other is empty.
func merged(a, b []string) []string {
	switch {
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}
	out := make([]string, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0] < b[0] {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// Which entries went away since when: the one thing that the present picture
// cannot tell a stream that resumes. What happened before this process began
// is read back from the store's own history, once for all streams.

package registry

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
)

const (
	// maxRemovals bounds the memory; older ones make resuming streams list.
	maxRemovals = 50_000
	// maxReadBack is how many revisions are read back rather than listed anew.
	maxReadBack     = 50_000
	readBackTimeout = 5 * time.Second
)

type removal struct {
	revision uint64
	parent   spiffeid.ID
	id       string
}

// history holds every removal after revision known, in order.
type history struct {
	known    uint64
	removals []removal
	// lost: up to here the store's history could not be read back.
	lost uint64
}

func (h *history) add(r removal) {
	h.removals = append(h.removals, r)
	if len(h.removals) > maxRemovals {
		cut := len(h.removals) / 2
		h.known = h.removals[cut-1].revision
		h.removals = slices.Clone(h.removals[cut:])
	}
}

func (h *history) after(revision uint64) []removal {
	i, _ := slices.BinarySearchFunc(h.removals, revision+1, func(r removal, rev uint64) int { return cmp.Compare(r.revision, rev) })
	return h.removals[i:]
}

// removals are those after revision, and since when they are all known.
func (r *Registry) removals(after uint64) (removals []removal, knownSince uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.history.after(after), r.history.known
}

// knowHistory says whether every removal after revision is known, reading the
// store's history back if need be.
func (r *Registry) knowHistory(ctx context.Context, revision uint64) bool {
	if known, lost := r.historyKnown(); revision >= known || revision <= lost || known-revision > maxReadBack {
		return revision >= known
	}
	// After a start every agent comes at once: one reads, the others find it read.
	select {
	case r.reading <- struct{}{}:
		defer func() { <-r.reading }()
	case <-ctx.Done():
		return false
	}
	known, lost := r.historyKnown()
	if revision >= known || revision <= lost {
		return revision >= known
	}
	earlier, ok := r.readBack(ctx, revision, known)
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.history.known != known: // many removals, or a new listing, moved it up
	case ok:
		r.history.removals = slices.Concat(earlier, r.history.removals)
		r.history.known = revision
	case ctx.Err() == nil:
		r.history.lost = revision
	}
	return r.history.known <= revision
}

func (r *Registry) historyKnown() (known, lost uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.history.known, r.history.lost
}

// readBack returns the removals above from, up to and including to.
func (r *Registry) readBack(ctx context.Context, from, to uint64) ([]removal, bool) {
	ctx, cancel := context.WithTimeout(ctx, readBackTimeout)
	defer cancel()
	batches, err := r.store.Watch(ctx, "", from)
	if err != nil {
		return nil, false
	}
	var removals []removal
	for b := range batches {
		if b.Revision > to {
			return removals, true
		}
		var ok bool
		if removals, ok = appendRemovals(removals, b); !ok {
			return nil, false
		}
		if b.Revision == to {
			return removals, true
		}
	}
	return nil, false
}

// appendRemovals says no when it cannot tell whose entry was removed: were it
// passed over, its agent would go on serving it.
func appendRemovals(to []removal, b store.Batch) ([]removal, bool) {
	var dec entry.Decoder
	for _, ev := range b.Events {
		id, ok := strings.CutPrefix(ev.KV.Key, EntryPrefix)
		if !ok || ev.Prev == nil { // nil: there was none to remove
			continue
		}
		before, err := dec.Decode(ev.Prev)
		if err != nil {
			return nil, false
		}
		if !ev.Delete {
			if e, err := decodeEntry(ev.KV, &dec); err == nil && e.ParentID == before.ParentID {
				continue
			}
		}
		to = append(to, removal{revision: b.Revision, parent: before.ParentID, id: id})
	}
	return to, true
}

// The last requests, for who asks on the admin socket why one went wrong.

package sidecar

import (
	"encoding/json"
	"sync"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// keptRequests is how many of each kind are kept: those that were served do not push
// out the others.
const keptRequests = 100

// recent keeps the last requests. It is safe for concurrent use.
type recent struct {
	mu           sync.Mutex // guards the rest
	served, lost ring
}

// ring has the last of something.
type ring struct {
	all  [keptRequests]kept
	next int
}

// kept is a request that is over.
type kept struct {
	hop   *hop.Hop // nil: none yet
	entry hop.Entry
}

func (r *ring) add(k kept) {
	r.all[r.next] = k
	r.next = (r.next + 1) % len(r.all)
}

// add keeps e.
func (r *recent) add(h *hop.Hop, e *hop.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	to := &r.served
	if e.Denied || e.Failed {
		to = &r.lost
	}
	to.add(kept{h, *e})
}

// lines are the kept requests as the access log writes them, the latest first: those
// that were denied or failed, or the others.
func (r *recent) lines(lost bool) []json.RawMessage {
	r.mu.Lock()
	from := &r.served
	if lost {
		from = &r.lost
	}
	all := *from
	r.mu.Unlock()
	lines := []json.RawMessage{}
	for i := range all.all {
		k := &all.all[(all.next-1-i+2*len(all.all))%len(all.all)]
		if k.hop != nil {
			lines = append(lines, appendEntry(nil, k.hop, &k.entry))
		}
	}
	return lines
}

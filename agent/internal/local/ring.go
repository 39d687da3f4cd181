// The last decisions, so that one of them can be explained afterwards.

package local

import (
	"context"
	"sync"
	"time"

	"merlon.dev/policy"
)

// ringSize is how many decisions are kept.
const ringSize = 10_000

// maxHeaderBytes bounds what is kept of one call's headers.
const maxHeaderBytes = 2048

// masked stands for the values of headers that carry secrets (SECURITY.md T37).
const masked = "(masked)"

// secretHeaders are never kept.
var secretHeaders = map[string]bool{
	"authorization": true, "proxy-authorization": true, "cookie": true, "set-cookie": true, "x-api-key": true,
}

// record is one decision.
type record struct {
	decision  policy.Decision
	input     policy.Input
	decidedAt time.Time
	shortened bool // the input is not kept whole
}

// ring is safe for concurrent use.
type ring struct {
	mu sync.Mutex
	// guarded by mu
	records []record
	next    int
	byID    map[policy.DecisionID]int
	added   chan struct{} // closed when there is another
}

func newRing() *ring { return &ring{byID: map[policy.DecisionID]int{}, added: make(chan struct{})} }

// add keeps a decision in place of the oldest.
func (r *ring) add(in *policy.Input, d policy.Decision, now time.Time) {
	rec := record{decision: d, input: *in, decidedAt: now}
	rec.input.Headers, rec.shortened = keepHeaders(in.Headers)
	if len(rec.input.Query) > maxHeaderBytes {
		rec.input.Query, rec.shortened = "", true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.byID[d.DecisionID]; known {
		return // nobody replaces the record of another's decision
	}
	if len(r.records) < ringSize {
		r.records = append(r.records, rec)
	} else {
		delete(r.byID, r.records[r.next].decision.DecisionID)
		r.records[r.next] = rec
	}
	r.byID[d.DecisionID] = r.next
	r.next = (r.next + 1) % ringSize
	close(r.added)
	r.added = make(chan struct{})
}

// patience is how long a record may take from the service that made it.
const patience = time.Second

// await finds the record of a decision that may have been made just now.
func (r *ring) await(ctx context.Context, id policy.DecisionID) (record, bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		r.mu.Lock()
		added := r.added
		r.mu.Unlock()
		if rec, ok := r.find(id); ok {
			return rec, true
		}
		select {
		case <-added:
		case <-ctx.Done():
			return record{}, false
		}
	}
}

func (r *ring) find(id policy.DecisionID) (record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, ok := r.byID[id]
	if !ok {
		return record{}, false
	}
	return r.records[i], true
}

// keepHeaders copies headers without secrets, as far as there is room.
func keepHeaders(headers map[string][]string) (kept map[string][]string, shortened bool) {
	room := maxHeaderBytes
	for name, values := range headers {
		if secretHeaders[name] {
			values, shortened = []string{masked}, true
		}
		room -= len(name)
		for _, v := range values {
			room -= len(v)
		}
		if room < 0 {
			return kept, true
		}
		if kept == nil {
			kept = make(map[string][]string, len(headers))
		}
		kept[name] = values
	}
	return kept, shortened
}

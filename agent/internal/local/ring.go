// The last decisions, so that one of them can be explained afterwards: which are
// kept, and what of their calls.

package local

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"merlon.dev/policy"
)

// Denials and calls that were allowed have room of their own, so that many of these
// do not displace those that somebody will ask for.
const (
	maxDenied  = 10_000
	maxAllowed = 1000
)

// maxHeaderBytes bounds what is kept of one call's headers, and maxStringBytes of each
// of its other strings: who calls makes them up, and ten thousand are kept.
const (
	maxHeaderBytes = 2048
	maxStringBytes = 2048
	stringOverhead = 16 // of each string of a list
)

// masked stands for the values of headers that are not to be kept: of any but those
// that the configuration names, for nobody can list all that carry secrets
// (SECURITY.md T37).
const masked = "(masked)"

// record is one decision.
type record struct {
	decision  policy.Decision
	input     policy.Input
	decidedAt time.Time
	// claims says that the call had claims of a JWT-SVID, which are not kept, and
	// shortened that more of the input is not, beside values of headers.
	claims, shortened bool
}

// decisions are the last ones. They are safe for concurrent use.
type decisions struct {
	denied, allowed *ring
	// keep has the headers whose values are kept.
	keep map[string]bool
}

func newDecisions(keep []string) *decisions {
	d := &decisions{denied: newRing(maxDenied), allowed: newRing(maxAllowed), keep: make(map[string]bool, len(keep))}
	for _, name := range keep {
		d.keep[strings.ToLower(name)] = true
	}
	return d
}

// add keeps a decision in place of the oldest. shortened says that in is not the
// whole call.
func (d *decisions) add(in *policy.Input, decision policy.Decision, now time.Time, shortened bool) {
	if d.denied.has(decision.DecisionID) || d.allowed.has(decision.DecisionID) {
		return // nobody replaces the record of another's decision
	}
	rec := record{decision: decision, input: *in, decidedAt: now, shortened: shortened}
	rec.keepHeaders(in.HeaderMap(), d.keep)
	rec.keepStrings()
	if in.JWT != nil {
		rec.input.JWT, rec.claims = nil, true
	}
	rec.decision.Response = nil // anybody's policy can make it large
	if decision.Allow {
		d.allowed.add(rec)
	} else {
		d.denied.add(rec)
	}
}

// ring is safe for concurrent use.
type ring struct {
	size int

	mu sync.Mutex
	// guarded by mu
	records []record
	next    int
	byID    map[policy.DecisionID]int
	added   chan struct{} // closed when there is another
}

func newRing(size int) *ring {
	return &ring{size: size, byID: map[policy.DecisionID]int{}, added: make(chan struct{})}
}

func (r *ring) add(rec record) {
	id := rec.decision.DecisionID
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.byID[id]; known {
		return // as in decisions.add, but for two at the same time
	}
	if len(r.records) < r.size {
		r.records = append(r.records, rec)
	} else {
		delete(r.byID, r.records[r.next].decision.DecisionID)
		r.records[r.next] = rec
	}
	r.byID[id] = r.next
	r.next = (r.next + 1) % r.size
	close(r.added)
	r.added = make(chan struct{})
}

// patience is how long a record may take from the service that made it.
const patience = time.Second

// await finds the record of a decision that may have been made just now.
func (d *decisions) await(ctx context.Context, id policy.DecisionID) (record, bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		denied, allowed := d.denied.changed(), d.allowed.changed()
		if rec, ok := d.denied.find(id); ok {
			return rec, true
		}
		if rec, ok := d.allowed.find(id); ok {
			return rec, true
		}
		select {
		case <-denied:
		case <-allowed:
		case <-ctx.Done():
			return record{}, false
		}
	}
}

// changed returns a channel that is closed at the next addition.
func (r *ring) changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.added
}

func (r *ring) has(id policy.DecisionID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, known := r.byID[id]
	return known
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

// keepStrings cuts what is too long. Of a query nothing is kept then.
func (rec *record) keepStrings() {
	in := &rec.input
	if len(in.Query) > maxStringBytes {
		in.Query, rec.shortened = "", true
	}
	for _, s := range []*string{(*string)(&in.Protocol), &in.Source, &in.Method, &in.Path, &in.Host, &in.SourceAddress, &in.DestinationAddress, &in.SourceSerial, &rec.decision.RuleID} {
		if len(*s) > maxStringBytes {
			*s, rec.shortened = strings.ToValidUTF8(strings.Clone((*s)[:maxStringBytes]), ""), true
		}
	}
	room := maxStringBytes
	for i, rule := range rec.decision.DryRun {
		if room -= stringOverhead + len(rule); room < 0 {
			rec.decision.DryRun, rec.shortened = slices.Clone(rec.decision.DryRun[:i]), true
			break
		}
	}
}

// maskedValues stands for the values of a header.
var maskedValues = []string{masked}

// keepHeaders copies headers as far as there is room, and only the values of those
// to be kept.
func (rec *record) keepHeaders(headers policy.HeaderMap, keep map[string]bool) {
	rec.input.Headers = nil
	if len(headers) == 0 {
		return
	}
	room, kept := maxHeaderBytes, make(policy.HeaderMap, len(headers))
	for name, values := range headers {
		if !keep[name] {
			values = maskedValues
		}
		room -= len(name)
		for _, v := range values {
			room -= stringOverhead + len(v)
		}
		if room < 0 {
			rec.shortened = true
			break
		}
		kept[name] = values
	}
	rec.input.Headers = kept
}

// masked are the names of the headers of rec whose values are not kept, sorted.
func (d *decisions) masked(rec *record) (names []string) {
	for name := range rec.input.HeaderMap() {
		if !d.keep[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

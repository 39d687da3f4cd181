// Package history is what happened in a run, as clients saw it: each operation
// with when it began, when it was answered, and whether it succeeded, was refused,
// or nobody knows; beside it what was broken and mended when, and what the system
// itself wrote down and held at the end. It judges nothing (package invariant does).
package history

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Now is the time of a history: nanoseconds of the machine's monotonic clock, which
// is one for all processes, and which nobody sets.
func Now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(fmt.Sprintf("history: read the monotonic clock: %v", err)) // no Linux refuses
	}
	return ts.Nano()
}

// Outcome is what the client of an operation knows.
type Outcome string

// The outcomes.
const (
	OK      Outcome = "ok"
	Failed  Outcome = "failed"  // it was refused, and did not happen
	Unknown Outcome = "unknown" // no answer: it may have happened, or may yet
)

// Kind is what a client tried.
type Kind string

// The kinds. Key and Value of each are said here.
const (
	Create  Kind = "create"  // Key: SPIFFE ID, one for each operation; Under: the agent; Value: entry ID; Number: revision
	Delete  Kind = "delete"  // Key: SPIFFE ID; Value: entry ID; Number: revision from which nothing may be issued for it
	Read    Kind = "read"    // Key: entry ID; Value: its SPIFFE ID, empty where there is no such entry
	Push    Kind = "push"    // Number: the generation
	Ban     Kind = "ban"     // Key: SPIFFE ID of the agent
	Revoke  Kind = "revoke"  // Key: SPIFFE ID; Number: revision before which its SVIDs were issued
	Join    Kind = "join"    // Key: a token; Value: serial number
	Sign    Kind = "sign"    // Client: an agent; Key: entry ID; Value: serial number
	Connect Kind = "connect" // Key: whom; by a new TLS connection; Value: serial number of its SVID
	Call    Kind = "call"    // Key: whom; over a pooled connection
	Beat    Kind = "beat"    // Key: from whom; one message of a stream that is held open
	Decide  Kind = "decide"  // Client decides on calls of others; Number: how many; failed: some were decided wrongly
)

// Op is one operation.
type Op struct {
	// Client is who tried it: the SPIFFE ID of a workload, or the name of a writer.
	Client  string  `json:"client"`
	Kind    Kind    `json:"kind"`
	Key     string  `json:"key"`
	Under   string  `json:"under,omitempty"`
	Value   string  `json:"value,omitempty"`
	Number  uint64  `json:"number,omitempty"` // revision or generation
	Begin   int64   `json:"begin"`
	End     int64   `json:"end"`
	Outcome Outcome `json:"outcome"`
	Detail  string  `json:"detail,omitempty"` // the error
}

// Window is a time in which something was broken.
type Window struct {
	Fault string `json:"fault"`
	From  int64  `json:"from"`
	To    int64  `json:"to"`
	// Sick are the SPIFFE IDs whose calls may fail meanwhile.
	Sick []string `json:"sick,omitempty"`
}

// Recovery is how long after a fault something worked again.
type Recovery struct {
	What  string        `json:"what"`
	Took  time.Duration `json:"took"` // negative: it did not
	Bound time.Duration `json:"bound"`
}

// Size is what a process takes.
type Size struct {
	Process    string `json:"process"`
	Resident   uint64 `json:"resident_bytes"`
	Files      int    `json:"files"`  // open ones, but Tables
	Tables     int    `json:"tables"` // of the store, which are as many as its data asks for
	Goroutines int    `json:"goroutines"`
}

// Growth compares a process before and after.
type Growth struct {
	Before, After Size
}

// Record is a line of an audit log.
type Record struct {
	Line     []byte `json:"-"` // as it is; the rest is in it
	Seq      uint64 `json:"seq"`
	Prev     string `json:"prev"`
	Hash     string `json:"hash"`
	Type     string `json:"type"`
	Actor    string `json:"actor"`
	SPIFFEID string `json:"spiffe_id"`
	EntryID  string `json:"entry_id"`
	Serial   string `json:"serial"`
	Detail   string `json:"detail"`
	Act      string `json:"act"`
	Pending  bool   `json:"pending"`
}

// Final is what the CA says it has when all is over.
type Final struct {
	Entries map[string]string // entry ID → SPIFFE ID
	Banned  map[string]bool   // SPIFFE IDs of agents
	// Revoked are SPIFFE IDs, and the highest revision before which SVIDs of each count no
	// more. Revocations are all records, of whatever subject.
	Revoked     map[string]uint64
	Revocations int
	// Generation is that of the policy in force.
	Generation uint64
}

// History is a whole run.
type History struct {
	Seed       uint64
	Ops        []Op
	Windows    []Window
	Recoveries []Recovery
	Growths    []Growth
	// Logs are the audit logs, one of each replica.
	Logs map[string][]Record
	// Allowed are the pairs of which the policy lets the first call the second, from
	// before the first recorded call on.
	Allowed []Pair
	// CutWithin is how long after the answer to its denial a peer may still succeed.
	CutWithin time.Duration
	Final     Final
}

// Pair is who calls whom, as SPIFFE IDs.
type Pair struct{ From, To string }

// Recorder collects what concurrent clients do. It is safe for concurrent use.
type Recorder struct {
	mu sync.Mutex
	// guarded by mu
	ops        []Op
	windows    []Window
	recoveries []Recovery
}

// Do runs one operation and records it. do fills what the answer says, and
// returns the outcome and the error that it comes from.
func (r *Recorder) Do(client string, kind Kind, key string, do func(*Op) (Outcome, error)) Op {
	op := Op{Client: client, Kind: kind, Key: key, Begin: Now()}
	outcome, err := do(&op)
	op.End, op.Outcome = Now(), outcome
	if err != nil {
		op.Detail = err.Error()
	}
	r.Add(op)
	return op
}

// Add records what another process did.
func (r *Recorder) Add(op Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, op)
}

// Follow records the operations that a process prints, a JSON object a line, up to an
// empty one.
func (r *Recorder) Follow(from io.Reader) error {
	for decoder := json.NewDecoder(from); ; {
		var op Op
		if err := decoder.Decode(&op); err != nil {
			return err
		}
		if op == (Op{}) {
			return nil
		}
		r.Add(op)
	}
}

// Break records that something is broken from now until the returned function is
// called; meanwhile the calls of sick may fail.
func (r *Recorder) Break(fault string, sick ...string) (mended func()) {
	w := Window{Fault: fault, From: Now(), Sick: sick}
	return sync.OnceFunc(func() {
		w.To = Now()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.windows = append(r.windows, w)
	})
}

// Recovered records how long something took to work again.
func (r *Recorder) Recovered(what string, took, bound time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recoveries = append(r.recoveries, Recovery{what, took, bound})
}

// History is what was recorded so far, in the order of beginning.
func (r *Recorder) History() *History {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := &History{Ops: slices.Clone(r.ops), Windows: slices.Clone(r.windows), Recoveries: slices.Clone(r.recoveries)}
	slices.SortStableFunc(h.Ops, func(a, b Op) int { return int(a.Begin - b.Begin) })
	return h
}

// Count says how many operations of each kind had each outcome: "call ok".
func (h *History) Count() map[string]int {
	n := make(map[string]int)
	for _, op := range h.Ops {
		n[string(op.Kind)+" "+string(op.Outcome)]++
	}
	return n
}

package crashtest

// What a child says about its life: one JSON object a line, each written by one
// system call before the next step, so that a SIGKILL loses no line that was
// written. Times are those of CLOCK_MONOTONIC, which all processes of a machine
// share: what happened before what is known across lives.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"merlon.dev/ca/internal/store"
)

// What a line reports.
const (
	lineOpen    = "open"    // the store is open; Result.Revision is where it stands
	lineInvoke  = "invoke"  // Op is about to begin
	lineOK      = "ok"      // ID ended with Result
	lineFail    = "fail"    // ID ended with an error that promises that nothing was written
	lineUnknown = "unknown" // ID ended with an error that promises nothing
	lineBatch   = "batch"   // Batch arrived on a watch
	lineEnd     = "end"     // the watch named by ID ended
	lineRefused = "refused" // the store did not open: Text says why
	lineClosed  = "closed"  // the store was closed
	lineCase    = "case"    // the inspection of the folder named by ID begins
)

// line is one report.
type line struct {
	At     int64   `json:"t"`
	What   string  `json:"w"`
	ID     string  `json:"i,omitempty"`
	Op     *call   `json:"o,omitempty"`
	Result *result `json:"r,omitempty"`
	Batch  *batch  `json:"b,omitempty"`
	Text   string  `json:"x,omitempty"`
	// Typed is set in a refusal that can be told from other errors by its type.
	Typed bool `json:"y,omitempty"`
}

// The kinds of calls.
const (
	kindTxn  = "txn"
	kindGet  = "get"
	kindList = "list"
)

// call is what is asked of a store.
type call struct {
	Kind            string      `json:"k"`
	Key             string      `json:"n,omitempty"` // of a get; the prefix of a list
	Cmps            []store.Cmp `json:"c,omitempty"`
	Then, Otherwise []write     `json:",omitempty"`
}

// write is one write of a transaction. Its value follows from the call's ID,
// the branch and the key.
type write struct {
	Key    string `json:"k"`
	Delete bool   `json:"d,omitempty"`
	Size   int    `json:"s,omitempty"`
}

// result is what a store answered.
type result struct {
	Succeeded bool   `json:"s,omitempty"`
	Revision  uint64 `json:"r"`
	KVs       []pair `json:"k,omitempty"`
}

// pair is a key as it was read, its value by its label.
type pair struct {
	Key      string `json:"k"`
	Label    string `json:"l"`
	Revision uint64 `json:"r"`
}

// batch is what a watch sent.
type batch struct {
	Watch    string  `json:"w"`
	Revision uint64  `json:"r"`
	Events   []event `json:"e"`
}

type event struct {
	Key    string `json:"k"`
	Delete bool   `json:"d,omitempty"`
	Label  string `json:"l,omitempty"`
	Prev   string `json:"p,omitempty"`
}

// now reads the clock of all lines, in nanoseconds.
func now() int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic("crashtest: no CLOCK_MONOTONIC: " + err.Error())
	}
	return ts.Nano()
}

// recorder writes lines. It is safe for concurrent use: os.File writes one
// after the other.
type recorder struct{ out *os.File }

// say stamps and writes l. A recorder that cannot write ends the process, for
// what it did from then on would go unseen.
func (r recorder) say(l line) {
	if l.At == 0 {
		l.At = now()
	}
	b, err := json.Marshal(l)
	if err == nil {
		_, err = r.out.Write(append(b, '\n'))
	}
	if err != nil {
		panic("crashtest: report: " + err.Error())
	}
}

// parseLines reads what a child wrote. The last line may have been cut off.
func parseLines(out []byte) ([]line, error) {
	var lines []line
	for raw := range bytes.Lines(out) {
		if !bytes.HasSuffix(raw, []byte("\n")) {
			break
		}
		var l line
		if err := json.Unmarshal(raw, &l); err != nil {
			return lines, fmt.Errorf("child said %q: %w", raw, err)
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// Branches of a transaction, as they end the name of a value.
const (
	branchThen      = "t"
	branchOtherwise = "o"
)

// label names a value: who wrote it, and how long it is.
func label(id, branch string, size int) string { return fmt.Sprintf("%s%s#%d", id, branch, size) }

// writer splits a label into the call and its branch.
func writer(label string) (id, branch string) {
	name, _, _ := strings.Cut(label, "#")
	if len(name) < 2 {
		return label, ""
	}
	return name[:len(name)-1], name[len(name)-1:]
}

// valueOf makes the value that label names below key.
func valueOf(key, label string, size int) []byte {
	b := append([]byte(label), '@')
	b = append(append(b, key...), '\n')
	return append(b, filler(b, size)...)
}

// labelOf is the inverse of valueOf. A value that nobody can have written below
// key gets a label that says so.
func labelOf(key string, value []byte) string {
	head, rest, ok := bytes.Cut(value, []byte("\n"))
	name, at, _ := bytes.Cut(head, []byte("@"))
	if !ok || string(at) != key || !bytes.Equal(rest, filler(value[:len(head)+1], len(rest))) ||
		!bytes.HasSuffix(name, fmt.Appendf(nil, "#%d", len(rest))) {
		return fmt.Sprintf("damaged %d bytes %.40q", len(value), value)
	}
	return string(name)
}

// filler makes size bytes that follow from seed.
func filler(seed []byte, size int) []byte {
	h := fnv.New64a()
	h.Write(seed)
	x := h.Sum64() | 1
	b := make([]byte, size)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// ops turns the writes of a branch into those of the store.
func ops(id, branch string, writes []write) []store.Op {
	all := make([]store.Op, len(writes))
	for i, w := range writes {
		if w.Delete {
			all[i] = store.Delete(w.Key)
		} else {
			all[i] = store.Put(w.Key, valueOf(w.Key, label(id, branch, w.Size), w.Size))
		}
	}
	return all
}

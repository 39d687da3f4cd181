package crashtest

// One history over many lives: calls with their outcome, what watches sent,
// and what was found at the end.

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// The outcomes of a call.
type outcome int

const (
	unknown outcome = iota // no answer came, or one that promises nothing
	acknowledged
	failed // an error that promises that nothing was written
)

// entry is one call of a history.
type entry struct {
	id       string
	call     *call
	from, to int64 // to: math.MaxInt64 while it may still take effect
	outcome  outcome
	result   result
}

// wrote returns what the call wrote if it took effect, and its branch.
func (e *entry) wrote() (writes []write, branch string) {
	switch {
	case e.call.Kind != kindTxn:
		return nil, ""
	case e.result.Succeeded:
		return e.call.Then, branchThen
	default:
		return e.call.Otherwise, branchOtherwise
	}
}

// history collects what the lives of one store report. It is not safe for
// concurrent use.
type history struct {
	// deathEnds is set where a call cannot take effect after the process that
	// made it is dead: on Badger.
	deathEnds bool

	start   map[string]pair // what the store held before
	entries map[string]*entry
	order   []*entry // in order of their begin
	watches map[string][]batch
	seen    map[string]sighting // by writer and branch
	opened  []opening
	final   *result // all keys at the end; nil before
	told    int64   // when
	trouble []string
}

// sighting is the first time that a value was read.
type sighting struct {
	at       int64
	revision uint64
}

type opening struct {
	at       int64
	revision uint64
}

// newHistory returns one of an empty store. deathEnds: no call takes effect
// once the process that made it is dead.
func newHistory(deathEnds bool) *history {
	return &history{
		deathEnds: deathEnds,
		start:     make(map[string]pair),
		entries:   make(map[string]*entry),
		watches:   make(map[string][]batch),
		seen:      make(map[string]sighting),
	}
}

func (h *history) troubled(format string, args ...any) {
	h.trouble = append(h.trouble, fmt.Sprintf(format, args...))
}

// add takes the lines of one life, which was dead at dead.
func (h *history) add(lines []line, dead int64) {
	var begun []*entry
	for _, l := range lines {
		switch l.What {
		case lineInvoke:
			e := &entry{id: l.ID, call: l.Op, from: l.At, to: math.MaxInt64}
			h.entries[l.ID] = e
			h.order = append(h.order, e)
			begun = append(begun, e)
		case lineOK, lineFail:
			h.end(l)
		case lineBatch:
			h.watched(l)
		case lineEnd:
			h.troubled("watch %s ended: %s", l.ID, l.Text)
		case lineOpen:
			h.found(l)
		case lineRefused:
			h.troubled("the store did not open: %s", l.Text)
		}
	}
	if h.deathEnds {
		for _, e := range begun {
			e.to = min(e.to, dead)
		}
	}
}

// end notes the answer to a call.
func (h *history) end(l line) {
	e := h.entries[l.ID]
	e.to = l.At
	if l.What == lineFail {
		e.outcome = failed
		return
	}
	e.outcome, e.result = acknowledged, *l.Result
	for _, kv := range l.Result.KVs {
		h.sight(kv.Label, l.At, kv.Revision)
	}
}

func (h *history) watched(l line) {
	h.watches[l.Batch.Watch] = append(h.watches[l.Batch.Watch], *l.Batch)
	for _, e := range l.Batch.Events {
		h.sight(e.Label, l.At, l.Batch.Revision)
	}
}

// found notes where a store stood when it was opened, or all that it held.
func (h *history) found(l line) {
	if l.Result.KVs == nil {
		h.opened = append(h.opened, opening{l.At, l.Result.Revision})
		return
	}
	h.final, h.told = l.Result, l.At
	for _, kv := range l.Result.KVs {
		h.sight(kv.Label, l.At, kv.Revision)
	}
}

func (h *history) sight(label string, at int64, revision uint64) {
	id, branch := writer(label)
	if first, ok := h.seen[id+branch]; !ok || at < first.at {
		h.seen[id+branch] = sighting{at, revision}
	}
}

// settle gives each call without an answer the outcome that others saw: a
// transaction whose value was read has taken effect before that reading ended.
// One that nobody ever saw, not even the watch of everything, has not.
func (h *history) settle() {
	for _, e := range h.order {
		if e.outcome != unknown || e.call.Kind != kindTxn {
			continue
		}
		for _, branch := range []string{branchThen, branchOtherwise} {
			if s, ok := h.seen[e.id+branch]; ok {
				e.outcome = acknowledged // by those who saw it
				e.result = result{Succeeded: branch == branchThen, Revision: s.revision}
				e.to = min(e.to, s.at)
			}
		}
	}
}

// counts returns how many calls were answered, refused, and left open.
func (h *history) counts() (ok, refused, open int) {
	for _, e := range h.order {
		switch e.outcome {
		case acknowledged:
			ok++
		case failed:
			refused++
		default:
			open++
		}
	}
	return ok, refused, open
}

// lastSeen returns the last revision that a watch delivered, or otherwise.
func (h *history) lastSeen(watch string, otherwise uint64) uint64 {
	if got := h.watches[watch]; len(got) > 0 {
		return got[len(got)-1].Revision
	}
	return otherwise
}

// next returns the history that goes on where this one ends: calls without an
// outcome stay open, for what a cluster was asked may still happen.
func (h *history) next() *history {
	n := newHistory(h.deathEnds)
	if h.final != nil {
		for _, kv := range h.final.KVs {
			n.start[kv.Key] = kv
		}
		n.opened = []opening{{h.told, h.final.Revision}}
	}
	if !h.deathEnds {
		for _, e := range h.order {
			if e.outcome == unknown && e.call.Kind == kindTxn {
				n.entries[e.id] = e
				n.order = append(n.order, e)
			}
		}
	}
	return n
}

// everything is the name of the watch that sees all keys.
const everything = "everything"

// check returns what breaks a promise, at most some of each kind; nothing: all
// hold.
func (h *history) check() []string {
	h.settle()
	found := slices.Clone(h.trouble)
	if h.final == nil {
		return append(found, "the store was not read at the end")
	}
	for _, check := range []func() []string{h.checkLog, h.checkWatches, h.checkOrder, h.checkEnd, h.checkLinear} {
		found = append(found, short(check())...)
	}
	return found
}

// short keeps a broken build from filling the log.
func short(found []string) []string {
	const most = 8
	if len(found) > most {
		return append(found[:most:most], fmt.Sprintf("… and %d more like these", len(found)-most))
	}
	return found
}

// first is where the history begins: the revision below its calls.
func (h *history) first() uint64 {
	var first uint64
	for _, kv := range h.start {
		first = max(first, kv.Revision)
	}
	return first
}

// checkLog replays the watch of everything: its revisions rise, each is one
// transaction, whole and of one caller, and each transaction that was
// acknowledged is in it where the caller was told.
func (h *history) checkLog() (found []string) {
	state := maps.Clone(h.start)
	owner := make(map[uint64]*entry)
	var last uint64
	for _, b := range h.watches[everything] {
		if b.Revision <= last {
			found = append(found, fmt.Sprintf("watch %s: revision %d after %d", everything, b.Revision, last))
		}
		last = b.Revision
		for _, e := range b.Events {
			if was := state[e.Key].Label; was != e.Prev {
				found = append(found, fmt.Sprintf("revision %d: %s was %q before; the watch says %q", b.Revision, e.Key, was, e.Prev))
			}
			if e.Delete {
				delete(state, e.Key)
			} else {
				state[e.Key] = pair{e.Key, e.Label, b.Revision}
				if id, _ := writer(e.Label); h.entries[id] == nil {
					found = append(found, fmt.Sprintf("revision %d: nobody wrote %s = %q", b.Revision, e.Key, e.Label))
				} else {
					owner[b.Revision] = h.entries[id]
				}
			}
		}
	}
	found = append(found, h.checkAcknowledged(owner)...)
	return append(found, checkState("the watch of everything adds up to", state, "the store", h.final.KVs)...)
}

// checkAcknowledged looks for each transaction that changed something in the
// log, and for each revision of the log among the transactions.
func (h *history) checkAcknowledged(owner map[uint64]*entry) (found []string) {
	events := make(map[uint64][]event, len(owner))
	for _, b := range h.watches[everything] {
		events[b.Revision] = b.Events
	}
	claimed := make(map[uint64]string)
	for _, e := range h.order {
		writes, branch := e.wrote()
		if e.outcome != acknowledged || !puts(writes) {
			continue // what only deletes can have changed nothing
		}
		r := e.result.Revision
		if other, twice := claimed[r]; twice {
			found = append(found, fmt.Sprintf("revision %d was given to %s and to %s", r, other, e.id))
		}
		claimed[r] = e.id
		if owner[r] != e {
			found = append(found, fmt.Sprintf("LOST: %s was acknowledged at revision %d, where the log has %s", e.id, r, describe(events[r])))
			continue
		}
		if diff := e.differs(writes, branch, events[r]); diff != "" {
			found = append(found, fmt.Sprintf("revision %d of %s: %s", r, e.id, diff))
		}
	}
	for r, e := range owner {
		if claimed[r] != e.id {
			found = append(found, fmt.Sprintf("revision %d holds %s, whose outcome was %d at revision %d", r, e.id, e.outcome, e.result.Revision))
		}
	}
	return found
}

func puts(writes []write) bool {
	return slices.ContainsFunc(writes, func(w write) bool { return !w.Delete })
}

// differs says what is missing in events, or too much.
func (e *entry) differs(writes []write, branch string, events []event) string {
	got := make(map[string]event, len(events))
	for _, ev := range events {
		got[ev.Key] = ev
	}
	if len(got) != len(events) {
		return "names a key twice"
	}
	for _, w := range writes {
		ev, ok := got[w.Key]
		delete(got, w.Key)
		switch {
		case !ok && w.Delete: // it did not exist; the replay has checked that
		case !ok:
			return "half a transaction: " + w.Key + " is missing"
		case ev.Delete != w.Delete || !w.Delete && ev.Label != label(e.id, branch, w.Size):
			return fmt.Sprintf("has %+v", ev)
		}
	}
	for key := range got {
		return "changes " + key + " too"
	}
	return ""
}

func describe(events []event) string {
	if events == nil {
		return "nothing"
	}
	var labels []string
	for _, e := range events {
		labels = append(labels, e.Key+"="+e.Label)
	}
	return strings.Join(labels, " ")
}

// checkState compares what the history adds up to with what the store holds.
func checkState(what string, want map[string]pair, who string, got []pair) (found []string) {
	rest := maps.Clone(want)
	for _, kv := range got {
		if rest[kv.Key] != kv {
			found = append(found, fmt.Sprintf("%s %+v, but %s has %+v", what, rest[kv.Key], who, kv))
		}
		delete(rest, kv.Key)
	}
	for _, key := range slices.Sorted(maps.Keys(rest)) {
		found = append(found, fmt.Sprintf("%s %+v, but %s has none", what, rest[key], who))
	}
	return found
}

// checkWatches holds each other watch against that of everything: the same
// batches as far as they lie under its prefix, each once, across all
// resumptions.
func (h *history) checkWatches() (found []string) {
	all := h.watches[everything]
	for name, got := range h.watches {
		if name == everything || len(got) == 0 {
			continue
		}
		prefix, from, _ := strings.Cut(name, "@")
		var after uint64 // names are PREFIX@AFTER, or PREFIX@AFTER@LIFE
		from, _, _ = strings.Cut(from, "@")
		after, _ = strconv.ParseUint(from, 10, 64) // a name of our own
		i := 0
		for _, b := range all {
			want := under(prefix, b)
			if b.Revision <= after || len(want.Events) == 0 {
				continue
			}
			if i == len(got) {
				break // it had not come so far when its last life ended
			}
			if got[i].Revision != want.Revision || !slices.Equal(got[i].Events, want.Events) {
				found = append(found, fmt.Sprintf("watch %s sent %+v where %+v comes next", name, got[i], want))
				break
			}
			i++
		}
		if i < len(got) && len(found) == 0 {
			found = append(found, fmt.Sprintf("watch %s sent %+v, which that of everything did not", name, got[i]))
		}
	}
	return found
}

func under(prefix string, b batch) batch {
	b.Events = slices.DeleteFunc(slices.Clone(b.Events), func(e event) bool { return !strings.HasPrefix(e.Key, prefix) })
	return b
}

// checkOrder holds revisions against real time: whoever began after another
// had ended has a higher revision if it wrote, and none below if it read.
func (h *history) checkOrder() (found []string) {
	type step struct {
		at    int64
		entry *entry // nil: an opening, which reads the revision
		open  uint64
		ends  bool
	}
	var steps []step
	for _, e := range h.order {
		if e.outcome == acknowledged {
			steps = append(steps, step{at: e.from, entry: e}, step{at: e.to, entry: e, ends: true})
		}
	}
	for _, o := range h.opened {
		steps = append(steps, step{at: o.at, open: o.revision})
	}
	// At one time, begins come first: they do not follow those that end.
	slices.SortStableFunc(steps, func(a, b step) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(bit(a.ends), bit(b.ends)))
	})
	floor := make(map[string]uint64, len(steps)/2) // by call: the highest revision that was known when it began
	var known uint64
	for _, s := range steps {
		switch {
		case s.entry == nil && s.open < known:
			found = append(found, fmt.Sprintf("opened at revision %d after %d was acknowledged", s.open, known))
		case s.entry == nil:
			known = s.open
		case !s.ends:
			floor[s.entry.id] = known
		default:
			e, least := s.entry, floor[s.entry.id]
			if writes, _ := e.wrote(); puts(writes) {
				least++
			}
			if e.result.Revision < least {
				found = append(found, fmt.Sprintf("%s ended at revision %d; %d is the least, for others had ended before it began", e.id, e.result.Revision, least))
			}
			known = max(known, e.result.Revision)
		}
	}
	return found
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// checkEnd looks for values at the end that nobody was told of, or wrote.
func (h *history) checkEnd() (found []string) {
	for _, kv := range h.final.KVs {
		id, branch := writer(kv.Label)
		e := h.entries[id]
		if h.start[kv.Key] == kv {
			continue
		}
		if e == nil {
			found = append(found, fmt.Sprintf("nobody wrote %+v", kv))
			continue
		}
		writes, ran := e.wrote()
		fits := slices.ContainsFunc(writes, func(w write) bool {
			return w.Key == kv.Key && !w.Delete && label(id, branch, w.Size) == kv.Label
		})
		if e.outcome != acknowledged || ran != branch || !fits || e.result.Revision != kv.Revision {
			found = append(found, fmt.Sprintf("%+v is not what %s wrote: %+v", kv, id, e.result))
		}
	}
	return found
}

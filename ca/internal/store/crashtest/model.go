package crashtest

// The store as porcupine knows it: one group of keys, with the revisions that
// callers were told. Calls without an answer were settled before.

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/anishathalye/porcupine"

	"merlon.dev/ca/internal/store"
)

// linearTime bounds the search of one group.
const linearTime = 2 * time.Minute

// cell is one key; revision 0: it does not exist.
type cell struct {
	label    string
	revision uint64
}

// groupState is what a group holds. All revisions that were answered are at
// least the one before, in the order in which the calls took effect.
type groupState struct {
	cells [keysPerGroup]cell
	known uint64
	done  int // calls that have taken effect
}

// turns are the revisions that the calls of a group were answered with, in
// order: a call has its turn when those with lower ones are done, a write before
// what was read at its revision. Without them porcupine would try the orders of
// all that overlaps, which is everything while a leader hangs.
type turns []turn

type turn struct {
	revision uint64
	reads    int // 1: it does not write
}

func turnOf(e *entry) turn {
	if writes, _ := e.wrote(); puts(writes) {
		return turn{e.result.Revision, 0}
	}
	return turn{e.result.Revision, 1}
}

func turnsOf(calls []porcupine.Operation) turns {
	var all turns
	for _, c := range calls {
		if e, ok := c.Input.(*entry); ok {
			all = append(all, turnOf(e))
		}
	}
	slices.SortFunc(all, func(a, b turn) int {
		return cmp.Or(cmp.Compare(a.revision, b.revision), cmp.Compare(a.reads, b.reads))
	})
	return all
}

// checkLinear asks porcupine whether the calls of each group can have taken
// effect one after the other, each between its begin and its end.
func (h *history) checkLinear() (found []string) {
	var (
		calls [groups][]porcupine.Operation
		start [groups]groupState
	)
	for _, kv := range h.start {
		if g, k, ok := cellOf(kv.Key); ok {
			start[g].cells[k] = cell{kv.Label, kv.Revision}
		}
	}
	for i, e := range h.order {
		if g, ok := e.group(); ok && e.outcome == acknowledged {
			calls[g] = append(calls[g], porcupine.Operation{ClientId: i, Input: e, Output: e, Call: e.from, Return: e.to})
		}
	}
	for g := range calls {
		calls[g] = append(calls[g], h.lastList(g))
		order := turnsOf(calls[g])
		model := porcupine.Model{
			Init: func() any { return start[g] },
			Step: func(state, input, _ any) (bool, any) {
				s, _ := state.(groupState)
				e, _ := input.(*entry)
				if order[s.done] != turnOf(e) {
					return false, s
				}
				next, ok := s.step(e)
				return ok, next
			},
		}
		switch res := porcupine.CheckOperationsTimeout(model, calls[g], linearTime); res {
		case porcupine.Ok:
		case porcupine.Illegal:
			found = append(found, fmt.Sprintf("NOT LINEARIZABLE: group %d with %d calls", g, len(calls[g])))
		default:
			found = append(found, fmt.Sprintf("group %d with %d calls: porcupine found no answer within %s", g, len(calls[g]), linearTime))
		}
	}
	return found
}

// lastList is what was read at the end, as a call.
func (h *history) lastList(g int) porcupine.Operation {
	e := &entry{id: "end", call: &call{Kind: kindList, Key: groupPrefix(g)}, outcome: acknowledged}
	e.result.Revision = h.final.Revision
	for _, kv := range h.final.KVs {
		if of, _, ok := cellOf(kv.Key); ok && of == g {
			e.result.KVs = append(e.result.KVs, kv)
		}
	}
	return porcupine.Operation{ClientId: math.MaxInt32, Input: e, Output: e, Call: h.told, Return: math.MaxInt64}
}

// group is the group that a call is about; false: none.
func (e *entry) group() (g int, ok bool) {
	if e.call.Kind == kindList {
		_, err := fmt.Sscanf(e.call.Key, "g%d/", &g)
		return g, err == nil
	}
	keys := []string{e.call.Key}
	for _, c := range e.call.Cmps {
		keys = append(keys, c.Key)
	}
	for _, w := range slices.Concat(e.call.Then, e.call.Otherwise) {
		keys = append(keys, w.Key)
	}
	for _, key := range keys {
		if g, _, ok = cellOf(key); ok {
			return g, true
		}
	}
	return 0, false
}

// step lets e take effect on s; false: it cannot have, with that answer.
func (s groupState) step(e *entry) (groupState, bool) {
	r := e.result.Revision
	if r < s.known {
		return s, false
	}
	before := s.known
	s.known = r
	s.done++
	if e.call.Kind != kindTxn {
		return s, s.shows(e)
	}
	if s.holds(e.call.Cmps) != e.result.Succeeded {
		return s, false
	}
	writes, branch := e.wrote()
	for _, w := range writes {
		_, k, ok := cellOf(w.Key)
		switch {
		case !ok:
		case w.Delete:
			s.cells[k] = cell{}
		default:
			s.cells[k] = cell{label(e.id, branch, w.Size), r}
		}
	}
	return s, !puts(writes) || r > before
}

func (s groupState) holds(cmps []store.Cmp) bool {
	for _, c := range cmps {
		if _, k, ok := cellOf(c.Key); ok && s.cells[k].revision != c.ModRevision {
			return false
		}
	}
	return true
}

// shows tells whether a get or a list saw s.
func (s groupState) shows(e *entry) bool {
	var got [keysPerGroup]cell
	for _, kv := range e.result.KVs {
		_, k, ok := cellOf(kv.Key)
		if !ok {
			return false
		}
		got[k] = cell{kv.Label, kv.Revision}
	}
	if e.call.Kind == kindGet {
		_, k, _ := cellOf(e.call.Key)
		return got[k] == s.cells[k]
	}
	return got == s.cells
}

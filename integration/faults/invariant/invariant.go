// Package invariant says what a history must not show, whatever was broken in it:
// I1 to I7 of SECURITY.md. Each is a pure function of a history; what it returns
// are the violations, each naming the operation that shows it.
package invariant

import (
	"fmt"
	"slices"
	"time"

	"merlon.dev/integration/faults/history"
)

// Invariant is one rule.
type Invariant struct {
	Name, Text string
	Check      func(*history.History) []string
}

// All are the seven.
var All = []Invariant{
	{"I1", "no acknowledged mutation is lost, and none that was refused is there", Mutations},
	{"I2", "no SVID is issued without a valid entry and attestation", Issuance},
	{"I3", "no call between healthy, authorised peers fails", Calls},
	{"I4", "who is denied succeeds no more", Denials},
	{"I5", "the audit log is complete and has no gap", Audit},
	{"I6", "processes return to the size that they had", Sizes},
	{"I7", "what was broken works again in time", Recoveries},
}

// Check is every violation of every invariant, by its name.
func Check(h *history.History) map[string][]string {
	found := make(map[string][]string)
	for _, i := range All {
		if v := i.Check(h); len(v) > 0 {
			found[i.Name] = v
		}
	}
	return found
}

func at(h *history.History, t int64) string {
	if len(h.Ops) == 0 {
		return time.Duration(t).String()
	}
	return time.Duration(t - h.Ops[0].Begin).Round(time.Millisecond).String()
}

func show(h *history.History, op history.Op) string {
	return fmt.Sprintf("%s of %s by %s, %s to %s: %s %s", op.Kind, op.Key, op.Client, at(h, op.Begin), at(h, op.End), op.Outcome, op.Detail)
}

// Mutations is I1. Every operation has a SPIFFE ID of its own, so each entry is a
// register that is written once and removed once, and the readings that begin after
// an answer must show what it says.
func Mutations(h *history.History) (found []string) {
	created, deleted := make(map[string]history.Op), make(map[string]history.Op)
	for _, op := range h.Ops {
		switch op.Kind {
		case history.Create:
			created[op.Value] = op
		case history.Delete:
			deleted[op.Value] = op
		}
	}
	ids := make(map[string]string) // SPIFFE ID → entry ID, at the end
	for id, name := range h.Final.Entries {
		ids[name] = id
	}
	for _, op := range h.Ops {
		switch {
		case op.Kind == history.Create && op.Outcome == history.OK:
			_, gone := deleted[op.Value]
			if _, there := h.Final.Entries[op.Value]; !there && !gone {
				found = append(found, "lost: "+show(h, op))
			}
		case op.Kind == history.Create && op.Outcome == history.Failed && ids[op.Key] != "":
			found = append(found, "refused, and there: "+show(h, op))
		case op.Kind == history.Delete && op.Outcome == history.OK && h.Final.Entries[op.Value] != "":
			found = append(found, "deleted, and there: "+show(h, op))
		case op.Kind == history.Read && op.Outcome == history.OK:
			found = append(found, stale(h, op, created[op.Key], deleted[op.Key])...)
		case op.Kind == history.Ban && op.Outcome == history.OK && !h.Final.Banned[op.Key],
			op.Kind == history.Revoke && op.Outcome == history.OK && h.Final.Revoked[op.Key] < op.Number:
			found = append(found, "lost: "+show(h, op))
		}
	}
	return append(found, generations(h)...)
}

// stale says whether a reading contradicts what was answered before it began.
func stale(h *history.History, read, created, deleted history.Op) []string {
	known := created.Outcome == history.OK && created.End < read.Begin
	begun := deleted.Kind != "" && deleted.Begin < read.End
	gone := deleted.Outcome == history.OK && deleted.End < read.Begin
	if read.Value == "" && known && !begun {
		return []string{"read as absent after its creation was answered: " + show(h, read)}
	}
	if read.Value != "" && gone {
		return []string{"read after its deletion was answered: " + show(h, read)}
	}
	return nil
}

// generations of policy are given once and rise, and the last is not behind them.
func generations(h *history.History) (found []string) {
	var pushes []history.Op
	for _, op := range h.Ops {
		if op.Kind == history.Push && op.Outcome == history.OK {
			pushes = append(pushes, op)
		}
	}
	for i, a := range pushes {
		for _, b := range pushes[:i] {
			if a.Number == b.Number || (b.End < a.Begin && b.Number > a.Number) {
				found = append(found, fmt.Sprintf("generation %d was given after %d: %s", a.Number, b.Number, show(h, a)))
			}
		}
		if a.Number > h.Final.Generation {
			found = append(found, fmt.Sprintf("generation %d is in force at the end; lost: %s", h.Final.Generation, show(h, a)))
		}
	}
	return found
}

// Calls is I3.
func Calls(h *history.History) (found []string) {
	denied := denials(h)
	for _, op := range h.Ops {
		if (op.Kind != history.Connect && op.Kind != history.Call) || op.Outcome == history.OK {
			continue
		}
		if !slices.Contains(h.Allowed, history.Pair{From: op.Client, To: op.Key}) || excused(h, denied, op) {
			continue
		}
		found = append(found, show(h, op))
	}
	return found
}

// excused says whether one of both ends was denied or not healthy meanwhile.
func excused(h *history.History, denied map[string]denial, op history.Op) bool {
	for _, end := range []string{op.Client, op.Key} {
		if d, ok := denied[end]; ok && d.asked < op.End {
			return true
		}
	}
	return slices.ContainsFunc(h.Windows, func(w history.Window) bool {
		return w.From <= op.End && op.Begin <= w.To && (slices.Contains(w.Sick, op.Client) || slices.Contains(w.Sick, op.Key))
	})
}

// denial is when a peer was denied: asked for, and answered (0: it was not).
type denial struct{ asked, answered int64 }

// denials are of peers whose entry was deleted or whose agent was banned, and of
// banned agents.
func denials(h *history.History) map[string]denial {
	denied := make(map[string]denial)
	deny := func(id string, op history.Op) {
		if _, before := denied[id]; before || op.Outcome == history.Failed {
			return
		}
		d := denial{asked: op.Begin}
		if op.Outcome == history.OK {
			d.answered = op.End
		}
		denied[id] = d
	}
	under := make(map[string][]string)
	for _, op := range h.Ops {
		if op.Kind == history.Create {
			under[op.Under] = append(under[op.Under], op.Key)
		}
	}
	for _, op := range h.Ops {
		switch op.Kind {
		case history.Delete:
			deny(op.Key, op)
		case history.Ban:
			deny(op.Key, op)
			for _, id := range under[op.Key] {
				deny(id, op)
			}
		}
	}
	return denied
}

// Denials is I4.
func Denials(h *history.History) (found []string) {
	denied := denials(h)
	late := func(id string, begun int64) bool {
		d, ok := denied[id]
		return ok && d.answered > 0 && begun > d.answered+h.CutWithin.Nanoseconds()
	}
	for _, op := range h.Ops {
		if op.Outcome != history.OK {
			continue
		}
		switch op.Kind {
		case history.Connect, history.Call:
			if late(op.Client, op.Begin) || late(op.Key, op.Begin) {
				found = append(found, "after a denial: "+show(h, op))
			} else if !slices.Contains(h.Allowed, history.Pair{From: op.Client, To: op.Key}) {
				found = append(found, "allowed by nothing: "+show(h, op))
			}
		case history.Beat:
			if late(op.Client, op.End) || late(op.Key, op.End) {
				found = append(found, "on a stream that lives on after a denial: "+show(h, op))
			}
		case history.Sign:
			if late(op.Client, op.Begin) {
				found = append(found, "after a ban: "+show(h, op))
			}
		}
	}
	return found
}

// Sizes is I6. What a process may have more than before is for what it may cache, for the
// entries that are left and the revocations that were made, which it holds until no SVID
// can be concerned, and for tables of the store: up to 15 that are not merged yet, and one
// for each 2 MiB.
func Sizes(h *history.History) (found []string) {
	const files, tables, goroutines = 8, 64, 16
	resident := uint64(64<<20 + 3<<10*h.Final.Revocations + 4<<10*len(h.Final.Entries))
	for _, g := range h.Growths {
		b, a := g.Before, g.After
		if a.Files > b.Files+files || a.Tables > b.Tables+tables || a.Goroutines > b.Goroutines+goroutines || a.Resident > b.Resident+b.Resident/2+resident {
			found = append(found, fmt.Sprintf("%s grew: %+v, %+v", b.Process, b, a))
		}
	}
	return found
}

// Recoveries is I7.
func Recoveries(h *history.History) (found []string) {
	for _, r := range h.Recoveries {
		if r.Took < 0 {
			found = append(found, r.What+" did not happen")
		} else if r.Took > r.Bound {
			found = append(found, fmt.Sprintf("%s took %v; the bound is %v", r.What, r.Took.Round(time.Millisecond), r.Bound))
		}
	}
	return found
}

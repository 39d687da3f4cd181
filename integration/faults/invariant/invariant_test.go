package invariant

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/integration/faults/history"
	"merlon.dev/sdk/svid"
)

const (
	agent = "spiffe://shop.test/agent/one"
	a, b  = "spiffe://shop.test/a", "spiffe://shop.test/b"
)

// op is an operation from begin to end.
func op(kind history.Kind, client, key string, begin, end int64, outcome history.Outcome) history.Op {
	return history.Op{Kind: kind, Client: client, Key: key, Begin: begin, End: end, Outcome: outcome}
}

// made is the creation of an entry at a revision; gone is its deletion.
func made(id, entryID string, begin, end int64, revision uint64) history.Op {
	o := op(history.Create, "w", id, begin, end, history.OK)
	o.Under, o.Value, o.Number = agent, entryID, revision
	return o
}

func gone(id, entryID string, begin, end int64, revision uint64) history.Op {
	o := op(history.Delete, "w", id, begin, end, history.OK)
	o.Value, o.Number = entryID, revision
	return o
}

func valued(o history.Op, value string) history.Op {
	o.Value = value
	return o
}

func numbered(o history.Op, n uint64) history.Op {
	o.Number = n
	return o
}

// chained makes a whole log of records.
func chained(records ...history.Record) []history.Record {
	prev := strings.Repeat("0", 64)
	for i := range records {
		r := &records[i]
		r.Seq, r.Prev = uint64(i)+1, prev
		body := fmt.Sprintf(`{"seq":%d,"prev":%q,"type":%q`, r.Seq, prev, r.Type)
		sum := sha256.Sum256([]byte(body))
		r.Hash = hex.EncodeToString(sum[:])
		r.Line = []byte(body + `,"hash":"` + r.Hash + `"}`)
		prev = r.Hash
	}
	return records
}

// issued is the record of an SVID that rests on a revision.
func issued(id, entryID, actor string, revision uint64) history.Record {
	serial, err := svid.NewSerial(7, revision)
	if err != nil {
		panic(err)
	}
	return history.Record{Type: "issue", SPIFFEID: id, EntryID: entryID, Actor: actor, Serial: serial.String()}
}

var attested = history.Record{Type: "attest", SPIFFEID: agent, Actor: "anonymous", Serial: "1"}

// Each history breaks the invariant that its name begins with, in the word that
// follows, or none.
func TestHistories(t *testing.T) {
	second := time.Second.Nanoseconds()
	allowed := []history.Pair{{From: a, To: b}}
	for name, c := range map[string]struct {
		h    history.History
		want string // in the violation; empty: there is none
	}{
		"I1 all is there": {history.History{
			Ops: []history.Op{made(a, "1", 1, 2, 5), made(b, "2", 3, 4, 6), gone(b, "2", 5, 6, 7)}, Final: history.Final{Entries: map[string]string{"1": a}},
		}, ""},
		"I1 an entry is lost":        {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}}, "lost"},
		"I1 nobody knows":            {history.History{Ops: []history.Op{op(history.Create, "w", a, 1, 2, history.Unknown)}}, ""},
		"I1 nobody knew":             {history.History{Ops: []history.Op{op(history.Create, "w", a, 1, 2, history.Unknown)}, Final: history.Final{Entries: map[string]string{"1": a}}}, ""},
		"I1 refused and there":       {history.History{Ops: []history.Op{op(history.Create, "w", a, 1, 2, history.Failed)}, Final: history.Final{Entries: map[string]string{"1": a}}}, "refused, and there"},
		"I1 a deletion is lost":      {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 6)}, Final: history.Final{Entries: map[string]string{"1": a}}}, "deleted, and there"},
		"I1 read too early":          {history.History{Ops: []history.Op{made(a, "1", 1, 4, 5), op(history.Read, "r", "1", 3, 5, history.OK)}, Final: history.Final{Entries: map[string]string{"1": a}}}, ""},
		"I1 read and absent":         {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5), op(history.Read, "r", "1", 3, 4, history.OK)}, Final: history.Final{Entries: map[string]string{"1": a}}}, "read as absent"},
		"I1 read while deleted":      {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5), op(history.Read, "r", "1", 3, 6, history.OK), gone(a, "1", 4, 5, 6)}}, ""},
		"I1 read after its deletion": {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 6), valued(op(history.Read, "r", "1", 5, 6, history.OK), a)}}, "read after its deletion"},
		"I1 a revocation is there":   {history.History{Ops: []history.Op{numbered(op(history.Revoke, "w", a, 1, 2, history.OK), 7)}, Final: history.Final{Revoked: map[string]uint64{a: 7}}}, ""},
		"I1 a revocation is lost":    {history.History{Ops: []history.Op{numbered(op(history.Revoke, "w", a, 1, 2, history.OK), 7)}, Final: history.Final{Revoked: map[string]uint64{a: 6, b: 7}}}, "lost"},
		"I1 a ban is lost":           {history.History{Ops: []history.Op{op(history.Ban, "w", agent, 1, 2, history.OK)}}, "lost"},
		"I1 generations":             {history.History{Ops: []history.Op{numbered(op(history.Push, "p", "", 1, 2, history.OK), 1), numbered(op(history.Push, "p", "", 3, 4, history.OK), 2)}, Final: history.Final{Generation: 2}}, ""},
		"I1 one generation twice":    {history.History{Ops: []history.Op{numbered(op(history.Push, "p", "", 1, 2, history.OK), 1), numbered(op(history.Push, "q", "", 1, 2, history.OK), 1)}, Final: history.Final{Generation: 2}}, "was given after"},
		"I1 generations fall":        {history.History{Ops: []history.Op{numbered(op(history.Push, "p", "", 1, 2, history.OK), 2), numbered(op(history.Push, "p", "", 3, 4, history.OK), 1)}, Final: history.Final{Generation: 2}}, "was given after"},
		"I1 a generation is lost":    {history.History{Ops: []history.Op{numbered(op(history.Push, "p", "", 1, 2, history.OK), 2)}, Final: history.Final{Generation: 1}}, "lost"},

		"I2 founded":                        {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(attested, issued(a, "1", agent, 6))}, ""},
		"I2 no entry":                       {history.History{Logs: logs(attested, issued(a, "1", agent, 6))}, "nobody created"},
		"I2 an entry that nobody knows of":  {history.History{Ops: []history.Op{op(history.Create, "w", a, 1, 2, history.Unknown)}, Logs: logs(attested, issued(a, "1", agent, 6))}, ""},
		"I2 another node's":                 {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(attested, history.Record{Type: "attest", SPIFFEID: "x"}, issued(a, "1", "x", 6))}, "the node of"},
		"I2 another name":                   {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(attested, issued(b, "1", agent, 6))}, "the entry is for"},
		"I2 before the entry":               {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(attested, issued(a, "1", agent, 4))}, "before the entry's"},
		"I2 before its end":                 {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 7)}, Logs: logs(attested, issued(a, "1", agent, 6))}, ""},
		"I2 after its end":                  {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 7)}, Logs: logs(attested, issued(a, "1", agent, 7))}, "went with"},
		"I2 an agent that did not attest":   {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(issued(a, "1", agent, 6))}, "never proved itself"},
		"I2 a token twice":                  {history.History{Ops: []history.Op{op(history.Join, "n", "token", 1, 2, history.OK), op(history.Join, "m", "token", 1, 2, history.OK)}}, "a token worked twice"},
		"I2 a token once, and once refused": {history.History{Ops: []history.Op{op(history.Join, "n", "token", 1, 2, history.OK), op(history.Join, "m", "token", 1, 2, history.Failed)}}, ""},
		"I3 a call fails":                   {history.History{Allowed: allowed, Ops: []history.Op{op(history.Call, a, b, 1, 2, history.Failed)}}, "call of"},
		"I3 a call has no answer":           {history.History{Allowed: allowed, Ops: []history.Op{op(history.Connect, a, b, 1, 2, history.Unknown)}}, "connect of"},
		"I3 who may not call":               {history.History{Allowed: allowed, Ops: []history.Op{op(history.Call, b, a, 1, 2, history.Failed)}}, ""},
		"I3 while one is sick":              {history.History{Allowed: allowed, Ops: []history.Op{op(history.Call, a, b, 3, 5, history.Failed)}, Windows: []history.Window{{From: 4, To: 9, Sick: []string{b}}}}, ""},
		"I3 while another is sick":          {history.History{Allowed: allowed, Ops: []history.Op{op(history.Call, a, b, 3, 5, history.Failed)}, Windows: []history.Window{{From: 4, To: 9, Sick: []string{agent}}}}, "call of"},
		"I3 after it was mended":            {history.History{Allowed: allowed, Ops: []history.Op{op(history.Call, a, b, 10, 11, history.Failed)}, Windows: []history.Window{{From: 4, To: 9, Sick: []string{b}}}}, "call of"},
		"I3 who is denied":                  {history.History{Allowed: allowed, Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 9, 6), op(history.Call, a, b, 4, 5, history.Failed)}}, ""},
		"I4 in time":                        {history.History{Allowed: allowed, CutWithin: time.Second, Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 6), op(history.Call, a, b, second, second+1, history.OK)}}, ""},
		"I4 too late":                       {history.History{Allowed: allowed, CutWithin: time.Second, Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 6), op(history.Call, a, b, second+5, second+6, history.OK)}}, "after a denial"},
		"I4 too late at the other end":      {history.History{Allowed: allowed, CutWithin: time.Second, Ops: []history.Op{made(b, "1", 1, 2, 5), gone(b, "1", 3, 4, 6), op(history.Call, a, b, second+5, second+6, history.OK)}}, "after a denial"},
		"I4 a stream lives on":              {history.History{Allowed: allowed, CutWithin: time.Second, Ops: []history.Op{made(a, "1", 1, 2, 5), gone(a, "1", 3, 4, 6), op(history.Beat, a, b, second+5, second+5, history.OK)}}, "lives on"},
		"I4 a denial that nobody knows of":  {history.History{Allowed: allowed, CutWithin: time.Second, Ops: []history.Op{made(a, "1", 1, 2, 5), op(history.Delete, "w", a, 3, 4, history.Unknown), op(history.Call, a, b, 9*second, 9*second+1, history.OK)}}, ""},
		"I4 a denial that was refused":      {history.History{Allowed: allowed, Ops: []history.Op{made(a, "1", 1, 2, 5), op(history.Delete, "w", a, 3, 4, history.Failed), op(history.Call, a, b, 9, 10, history.OK)}}, ""},
		"I4 below a banned agent":           {history.History{Allowed: allowed, Ops: []history.Op{made(a, "1", 1, 2, 5), op(history.Ban, "w", agent, 3, 4, history.OK), op(history.Call, a, b, 9, 10, history.OK)}}, "after a denial"},
		"I4 a banned agent":                 {history.History{Ops: []history.Op{op(history.Ban, "w", agent, 3, 4, history.OK), op(history.Sign, agent, "1", 9, 10, history.OK)}}, "after a ban"},
		"I4 allowed by nothing":             {history.History{Ops: []history.Op{op(history.Call, a, b, 9, 10, history.OK)}}, "allowed by nothing"},
		"I5 whole":                          {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(attested, history.Record{Type: "admin", Detail: "create entry", EntryID: "1"})}, ""},
		"I5 no log":                         {history.History{}, "no audit log"},
		"I5 an act without a record":        {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(attested)}, "no record of create"},
		"I5 an act that only began":         {history.History{Ops: []history.Op{made(a, "1", 1, 2, 5)}, Logs: logs(history.Record{Type: "admin", Detail: "create entry", EntryID: "1", Pending: true})}, "no record of create"},
		"I5 an SVID without a record":       {history.History{Allowed: allowed, Ops: []history.Op{valued(op(history.Connect, a, b, 1, 2, history.OK), "77")}, Logs: logs(attested)}, "no record of connect"},
		"I5 a record is missing":            {history.History{Logs: map[string][]history.Record{"ca": slices.Delete(chained(attested, attested, attested), 1, 2)}}, "record 3 follows record 1"},
		"I5 the first is missing":           {history.History{Logs: map[string][]history.Record{"ca": chained(attested, attested)[1:]}}, "record 2 follows record 0"},
		"I5 a record was changed":           {history.History{Logs: map[string][]history.Record{"ca": touched(chained(attested, attested), 0)}}, "record 1 was changed"},
		"I6 as before":                      {history.History{Growths: []history.Growth{{Before: history.Size{Files: 20, Goroutines: 50, Resident: 50 << 20}, After: history.Size{Files: 21, Goroutines: 52, Resident: 60 << 20}}}}, ""},
		"I6 tables of the store":            {history.History{Growths: []history.Growth{{Before: history.Size{Tables: 2}, After: history.Size{Tables: 66}}}}, ""},
		"I6 tables":                         {history.History{Growths: []history.Growth{{Before: history.Size{Tables: 2}, After: history.Size{Tables: 67}}}}, "grew"},
		"I6 files":                          {history.History{Growths: []history.Growth{{Before: history.Size{Files: 20}, After: history.Size{Files: 40}}}}, "grew"},
		"I6 goroutines":                     {history.History{Growths: []history.Growth{{Before: history.Size{Goroutines: 20}, After: history.Size{Goroutines: 40}}}}, "grew"},
		"I6 memory for revocations":         {history.History{Final: history.Final{Revocations: 40_000}, Growths: []history.Growth{{Before: history.Size{Resident: 50 << 20}, After: history.Size{Resident: 200 << 20}}}}, ""},
		"I6 memory for entries":             {history.History{Final: history.Final{Entries: entries(40_000)}, Growths: []history.Growth{{Before: history.Size{Resident: 50 << 20}, After: history.Size{Resident: 240 << 20}}}}, ""},
		"I6 memory beside entries":          {history.History{Final: history.Final{Entries: entries(1000)}, Growths: []history.Growth{{Before: history.Size{Resident: 50 << 20}, After: history.Size{Resident: 240 << 20}}}}, "grew"},
		"I6 memory beside revocations":      {history.History{Final: history.Final{Revocations: 1000}, Growths: []history.Growth{{Before: history.Size{Resident: 50 << 20}, After: history.Size{Resident: 200 << 20}}}}, "grew"},
		"I5 a revocation without a record":  {history.History{Ops: []history.Op{op(history.Revoke, "w", a, 1, 2, history.OK)}, Logs: logs(attested)}, "no record of revoke"},
		"I6 memory":                         {history.History{Growths: []history.Growth{{Before: history.Size{Resident: 50 << 20}, After: history.Size{Resident: 500 << 20}}}}, "grew"},
		"I7 in time":                        {history.History{Recoveries: []history.Recovery{{What: "it", Took: time.Second, Bound: time.Second}}}, ""},
		"I7 late":                           {history.History{Recoveries: []history.Recovery{{What: "it", Took: 2 * time.Second, Bound: time.Second}}}, "the bound is"},
		"I7 never":                          {history.History{Recoveries: []history.Recovery{{What: "it", Took: -1, Bound: time.Second}}}, "did not happen"},
	} {
		t.Run(name, func(t *testing.T) {
			i := slices.IndexFunc(All, func(i Invariant) bool { return strings.HasPrefix(name, i.Name) })
			found := All[i].Check(&c.h)
			switch {
			case c.want == "" && len(found) > 0:
				t.Errorf("%s says %q; want nothing", All[i].Name, found)
			case c.want != "" && (len(found) == 0 || !strings.Contains(found[0], c.want)):
				t.Errorf("%s says %q; want %q", All[i].Name, found, c.want)
			}
		})
	}
}

func logs(records ...history.Record) map[string][]history.Record {
	return map[string][]history.Record{"ca": chained(records...)}
}

func touched(log []history.Record, i int) []history.Record {
	log[i].Line = bytes.Replace(log[i].Line, []byte("attest"), []byte("attesT"), 1)
	return log
}

// system is a CA that keeps its promises, driven by rapid: each operation takes
// effect at some time between its begin and end, or, if nobody gets to know, perhaps.
type system struct {
	h   history.History
	now int64
	rev uint64
}

func (s *system) tick() int64 { s.now += 10; return s.now }

func runSystem(t *rapid.T) *system {
	s := &system{h: history.History{Final: history.Final{Entries: make(map[string]string)}}}
	var log []history.Record
	log = append(log, attested)
	there := make(map[string]history.Op)
	for i := range rapid.IntRange(1, 40).Draw(t, "operations") {
		s.rev++
		id, entryID := fmt.Sprintf("spiffe://shop.test/%d", i), fmt.Sprint(i)
		outcome := rapid.SampledFrom([]history.Outcome{history.OK, history.OK, history.Failed, history.Unknown}).Draw(t, "outcome")
		happens := outcome == history.OK || (outcome == history.Unknown && rapid.Bool().Draw(t, "happens"))
		o := op(history.Create, "w", id, s.tick(), s.tick(), outcome)
		o.Under = agent
		if outcome == history.OK {
			o.Value, o.Number = entryID, s.rev
		}
		s.h.Ops = append(s.h.Ops, o)
		if happens {
			s.h.Final.Entries[entryID] = id
			log = append(log, history.Record{Type: "admin", Detail: "create entry", EntryID: entryID, SPIFFEID: id}, issued(id, entryID, agent, s.rev))
		}
		if outcome != history.OK {
			continue
		}
		there[entryID] = o
		s.h.Ops = append(s.h.Ops, valued(op(history.Read, "r", entryID, s.tick(), s.tick(), history.OK), id))
		if rapid.Bool().Draw(t, "deleted") {
			s.rev++
			outcome := rapid.SampledFrom([]history.Outcome{history.OK, history.Unknown}).Draw(t, "outcome of the deletion")
			d := gone(id, entryID, s.tick(), s.tick(), s.rev)
			d.Outcome = outcome
			s.h.Ops = append(s.h.Ops, d)
			if outcome == history.OK || rapid.Bool().Draw(t, "it happens") {
				delete(s.h.Final.Entries, entryID)
				log = append(log, history.Record{Type: "admin", Detail: "delete entry", EntryID: entryID, SPIFFEID: id})
				delete(there, entryID)
			}
		}
	}
	s.h.Logs = logs(log...)
	return s
}

func TestASystemThatKeepsItsPromisesIsNotBlamed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		if found := Check(&runSystem(t).h); len(found) > 0 {
			t.Fatalf("blamed: %v", found)
		}
	})
}

// Whatever is taken from such a history shows.
func TestWhatIsTakenAwayShows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := runSystem(t)
		var acknowledged []history.Op
		for _, o := range s.h.Ops {
			if o.Kind == history.Create && o.Outcome == history.OK && s.h.Final.Entries[o.Value] != "" {
				acknowledged = append(acknowledged, o)
			}
		}
		log := s.h.Logs["ca"]
		switch rapid.IntRange(0, 1).Draw(t, "what") {
		case 0: // an entry that was acknowledged, and not deleted
			for _, o := range acknowledged {
				delete(s.h.Final.Entries, o.Value)
			}
			deletedMaybe := func(id string) bool {
				return slices.ContainsFunc(s.h.Ops, func(o history.Op) bool { return o.Kind == history.Delete && o.Value == id })
			}
			if slices.ContainsFunc(acknowledged, func(o history.Op) bool { return !deletedMaybe(o.Value) }) && len(Mutations(&s.h)) == 0 {
				t.Fatal("a lost entry is not seen")
			}
		case 1: // any record but the last, which may be on its way
			i := rapid.IntRange(0, len(log)-1).Draw(t, "record")
			if i < len(log)-1 {
				s.h.Logs["ca"] = slices.Delete(slices.Clone(log), i, i+1)
				if len(Audit(&s.h)) == 0 {
					t.Fatal("a missing record is not seen")
				}
			}
		}
	})
}

// entries are n that nobody deleted.
func entries(n int) map[string]string {
	all := make(map[string]string, n)
	for i := range n {
		all[strconv.Itoa(i)] = "spiffe://td.test/w/" + strconv.Itoa(i)
	}
	return all
}

// Package replay asks a policy about the calls of a decision log and says which of them
// it decides otherwise. A log is read as it comes: what is kept of it is bounded.
package replay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
)

const (
	// maxGroups and maxExamples bound what is kept of a log.
	maxGroups   = 10_000
	maxExamples = 3
	maxParts    = 1000
	// maxExampleBytes is the longest call that is an example.
	maxExampleBytes = 4096
)

// Verdict is what was decided of a call, or would be.
type Verdict struct {
	Allow  bool          `json:"allow"`
	Reason policy.Reason `json:"reason"`
	RuleID string        `json:"rule_id,omitempty"`
}

// Group are the calls from a source to a destination that come out otherwise in the same
// way.
type Group struct {
	Source      string  `json:"source"`
	Destination string  `json:"destination"`
	Before      Verdict `json:"before"`
	After       Verdict `json:"after"`
	// Events is how many there are in the log, and Calls for how many these stand:
	// of allowed calls a log may have some only.
	Events int     `json:"events"`
	Calls  float64 `json:"calls"`
	// Incomplete of the events lack something that the policy may read.
	Incomplete int       `json:"incomplete,omitempty"`
	Examples   []Example `json:"examples"`
}

// Example is an event of the log.
type Example struct {
	Line       int           `json:"line"`
	DecisionID string        `json:"decision_id,omitempty"`
	Timestamp  time.Time     `json:"timestamp"`
	Input      *policy.Input `json:"input"`
}

// Report is what came of a log.
type Report struct {
	// Changed are the groups whose calls the policy would allow and were denied, or
	// the other way round; Otherwise those that come out the same for another reason
	// or by another rule. The largest are first.
	Changed   []Group `json:"changed"`
	Otherwise []Group `json:"otherwise"`
	// Events is how many were decided again, and Calls for how many they stand.
	Events int     `json:"events"`
	Calls  float64 `json:"calls"`
	// Sampled of them were chosen from several, and Incomplete lack a part of the call
	// that the policy may read, by the names of these parts.
	Sampled         int            `json:"sampled"`
	Incomplete      int            `json:"incomplete"`
	IncompleteParts map[string]int `json:"incomplete_parts"`
	// Erased have no call any more, or one with bytes that are no text; Before were decided before any policy, by reason;
	// Other are events and lines about something else. None is decided again.
	Erased int                   `json:"erased"`
	Before map[policy.Reason]int `json:"before_policy"`
	Other  int                   `json:"other"`
	// Missing is how many decisions the log itself says that it lacks.
	Missing uint64 `json:"missing"`
	// Bad lines could not be read.
	Bad int `json:"bad_lines"`
	// Ungrouped are events that come out otherwise and found no place in a group.
	Ungrouped int `json:"ungrouped"`
}

// Replayer holds what came of the logs so far. It is not safe for concurrent use.
type Replayer struct {
	engine *engine.Engine
	report Report
	groups map[key]*Group
	reads  map[string]bool // what engine.MayRead said of parts
	bad    func(line int, err error)
}

type key struct {
	source, destination string
	before, after       Verdict
}

// New makes a Replayer that asks e. bad is told of each line that cannot be read.
func New(e *engine.Engine, bad func(line int, err error)) *Replayer {
	return &Replayer{
		engine: e, bad: bad, groups: map[key]*Group{}, reads: map[string]bool{},
		report: Report{IncompleteParts: map[string]int{}, Before: map[policy.Reason]int{}},
	}
}

// Read replays a log, plain or compressed by gzip. The error is about the log as a
// whole; what was read until then counts.
func (r *Replayer) Read(ctx context.Context, log io.Reader) error {
	return lines(reader{ctx, log}, func(number int, line []byte, err error) {
		if err != nil {
			r.refuse(number, err)
			return
		}
		failed := false
		events(line, func(e *event, err error) {
			if err == nil {
				err = r.event(ctx, number, e)
			}
			if err != nil && !failed {
				failed = true
				r.refuse(number, err)
			}
		})
	})
}

// reader ends with its context.
type reader struct {
	ctx context.Context //nolint:containedctx // of one call of Read
	io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

func (r *Replayer) refuse(number int, err error) {
	r.report.Bad++
	r.bad(number, err)
}

// beforePolicy are the reasons that stand before any policy.
var beforePolicy = []policy.Reason{policy.NoIdentity, policy.BadRequest, policy.Revoked, policy.Expired, policy.StaleRevocations, policy.AgentUnavailable}

func (r *Replayer) event(ctx context.Context, number int, e *event) error {
	r.report.Missing += e.Custom.Merlon.Dropped
	if !e.about() {
		if e.Path == "" && e.Message == "" {
			return errors.New("is no event of a decision log")
		}
		r.report.Other++
		return nil
	}
	before, err := e.before()
	if err != nil {
		return err
	}
	if slices.Contains(beforePolicy, before.Reason) {
		r.report.Before[before.Reason]++
		return nil
	}
	missing := e.missing()
	if len(e.Input) == 0 || slices.Contains(missing, "") {
		r.report.Erased++
		return nil
	}
	if e.Timestamp.IsZero() {
		return errors.New("has no timestamp")
	}
	in, err := policy.ParseInput(e.Input)
	if err != nil && replaced(e.Input) {
		r.report.Erased++
		return nil
	}
	if err != nil {
		return err
	}
	d := r.engine.Ask(ctx, in, e.Timestamp)
	r.count(number, e, in, before, Verdict{d.Allow, d.Reason, d.RuleID}, r.matter(missing))
	return ctx.Err()
}

// replaced says whether a call had bytes that are no text: whoever wrote the log put
// U+FFFD in their place.
func replaced(raw []byte) bool {
	return bytes.ContainsRune(raw, utf8.RuneError) || bytes.Contains(bytes.ToLower(raw), []byte(`\ufffd`))
}

// matter are those of the missing parts that the policy may read.
func (r *Replayer) matter(missing []string) (parts []string) {
	for _, part := range missing {
		part = shorten(part)
		reads, known := r.reads[part]
		if !known {
			reads = r.engine.MayRead(part)
			if len(r.reads) < maxParts {
				r.reads[part] = reads
			}
		}
		if reads && !slices.Contains(parts, part) {
			parts = append(parts, part)
		}
	}
	return parts
}

func (r *Replayer) count(number int, e *event, in *policy.Input, before, after Verdict, incomplete []string) {
	p := &r.report
	p.Events++
	p.Calls += e.standsFor()
	if e.standsFor() > 1 {
		p.Sampled++
	}
	for _, part := range incomplete {
		if _, known := p.IncompleteParts[part]; known || len(p.IncompleteParts) < maxParts {
			p.IncompleteParts[part]++
		}
	}
	if len(incomplete) > 0 {
		p.Incomplete++
	}
	if same(before, after) {
		return
	}
	k := key{in.Source, in.Destination, before, after}
	g := r.groups[k]
	if g == nil {
		if len(r.groups) >= maxGroups {
			p.Ungrouped++
			return
		}
		g = &Group{Source: strings.Clone(in.Source), Destination: strings.Clone(in.Destination), Before: before, After: after, Examples: []Example{}}
		r.groups[k] = g
	}
	g.Events++
	g.Calls += e.standsFor()
	if len(incomplete) > 0 {
		g.Incomplete++
	}
	if len(g.Examples) < maxExamples && len(e.Input) <= maxExampleBytes {
		g.Examples = append(g.Examples, Example{number, shorten(e.DecisionID), e.Timestamp, in})
	}
}

// same says whether nothing changed. Of a plain true or false only that is known.
func same(before, after Verdict) bool {
	if before.Allow != after.Allow {
		return false
	}
	plain := before.RuleID == "" && (before.Reason == policy.Allowed || before.Reason == policy.NoGrant)
	return plain || before == after
}

// shorten bounds a text of the log.
func shorten(s string) string { return strings.Clone(fmt.Sprintf("%.200s", s)) }

// Report is what came of the logs that were read.
func (r *Replayer) Report() *Report {
	out := r.report
	out.Changed, out.Otherwise = []Group{}, []Group{}
	for _, g := range r.groups {
		if g.Before.Allow != g.After.Allow {
			out.Changed = append(out.Changed, *g)
		} else {
			out.Otherwise = append(out.Otherwise, *g)
		}
	}
	slices.SortFunc(out.Changed, bySize)
	slices.SortFunc(out.Otherwise, bySize)
	return &out
}

func bySize(a, b Group) int {
	if a.Calls != b.Calls {
		if a.Calls > b.Calls {
			return -1
		}
		return 1
	}
	text := func(g Group) []string {
		return []string{g.Destination, g.Source, string(g.Before.Reason), g.Before.RuleID, string(g.After.Reason), g.After.RuleID}
	}
	return slices.Compare(text(a), text(b))
}

package engine

// This file asks OPA's tracer what of a policy's own Rego held and what did not,
// and reduces its account to the lines that matter to the author.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"

	"merlon.dev/policy"
)

const (
	// explainLimit is how long OPA may take to be traced.
	explainLimit = 2 * time.Second
	// maxEvents and maxEventBytes, of the text that events are about, bound what is
	// kept of an evaluation, and maxTraceBytes what is shown of it.
	maxEvents     = 50_000
	maxEventBytes = 16 << 20
	maxTraceBytes = 1 << 20
	// maxValue bounds what is shown of a value of the input.
	maxValue = 120
)

// recorder keeps OPA's events, so many as there is room for.
type recorder struct {
	events []*topdown.Event
	bytes  int
	locals bool // with the values of variables
	cut    bool // there was no room for all of it, and the evaluation has ended
	end    func()
}

func (r *recorder) Enabled() bool { return true }

func (r *recorder) Config() topdown.TraceConfig {
	return topdown.TraceConfig{PlugLocalVars: r.locals}
}

func (r *recorder) TraceEvent(e topdown.Event) {
	if e.Location != nil {
		r.bytes += len(e.Location.Text)
	}
	if len(r.events) == maxEvents || r.bytes > maxEventBytes {
		r.cut = true
		r.end()
		return
	}
	r.events = append(r.events, &e)
}

// traced evaluates q for the call in and tells r. Where it is asked to be thorough, all
// rules are tried, also those that an index would pass over.
func (e *Engine) traced(ctx context.Context, in *policy.Input, now time.Time, q *query, r topdown.QueryTracer, thorough bool) error {
	call := e.lookUp(in, now)
	return run(ctx, topdown.NewQuery(q.body).
		WithQueryCompiler(q.compiler).
		WithCompiler(e.program.compiler).
		WithStore(e.store).
		WithTransaction(e.txn).
		WithInput(e.input(in, &call)).
		WithTime(now).
		WithIndexing(!thorough).
		WithEarlyExit(!thorough), r)
}

// run evaluates q to its end, for explainLimit at most and as long as a recorder has
// room, and tells r.
func run(ctx context.Context, q *topdown.Query, r topdown.QueryTracer) (err error) {
	defer func() {
		if p := recover(); p != nil { // a bug in OPA, as in evaluate
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	cancel := topdown.NewCancel()
	timer := time.AfterFunc(explainLimit, cancel.Cancel)
	defer timer.Stop()
	defer context.AfterFunc(ctx, cancel.Cancel)()
	records, _ := r.(*recorder)
	if records != nil {
		records.end = cancel.Cancel
	}
	err = q.WithQueryTracer(r).WithCancel(cancel).WithMetrics(metrics.NoOp()).WithStrictBuiltinErrors(true).
		Iter(ctx, func(topdown.QueryResult) error { return nil })
	switch {
	case !topdown.IsCancel(err):
		return err
	case records != nil && records.cut:
		return nil
	}
	return errors.New("it took too long to be traced")
}

// trace is OPA's account of the whole evaluation.
func (e *Engine) trace(ctx context.Context, in *policy.Input, now time.Time) string {
	r := recorder{locals: true}
	err := e.traced(ctx, in, now, &e.program.decidesAndRecords, &r, true)
	var b strings.Builder
	topdown.PrettyTraceWithLocation(&b, r.events)
	text := b.String()
	if len(text) > maxTraceBytes {
		text, r.cut = text[:maxTraceBytes]+"\n", true
	}
	if r.cut {
		text += "… cut: the evaluation has more steps\n"
	}
	if err != nil {
		text += err.Error() + "\n"
	}
	return text
}

// grounds traces the policy's own rules of this name, "allow" or "deny": which of
// them held, and which expressions below them kept the others from it, in
// sentences that begin with file and line.
func (e *Engine) grounds(ctx context.Context, in *policy.Input, now time.Time, name string) (held, failed []string) {
	for _, pkg := range []string{"data.authz", "data.envoy.authz"} {
		if e.program.compiler.GetRules(ast.MustParseRef(pkg+"."+name)) == nil {
			continue
		}
		q, err := newQuery(e.program.compiler, ast.MustParseBody(fmt.Sprintf("answer = %s.%s", pkg, name)))
		if err != nil {
			return held, append(failed, err.Error())
		}
		var r recorder
		if err := e.traced(ctx, in, now, &q, &r, true); err != nil {
			failed = append(failed, fmt.Sprintf("%s.%s: %v", pkg, name, err))
		}
		call := e.lookUp(in, now)
		s := newSteps(r.events, e.input(in, &call))
		held = append(held, s.held(pkg+"."+name)...)
		failed = append(failed, s.failed()...)
		if r.cut {
			failed = append(failed, "the evaluation has more steps than are looked at")
		}
	}
	return held, failed
}

// steps are a trace by what was evaluated.
type steps struct {
	events  []*topdown.Event
	input   *ast.Term
	queries map[uint64]*step
}

// step is one query of a trace: the body of a rule, a negation, a comprehension.
type step struct {
	parent *step
	rule   *ast.Rule // nil where it is no rule's
	exited bool      // it held, for some values
	aside  bool      // it is below a negation or the like, or a rule that held
}

func newSteps(events []*topdown.Event, input *ast.Term) *steps {
	s := &steps{events: events, input: input, queries: map[uint64]*step{}}
	for _, e := range events {
		q := s.queries[e.QueryID]
		if q == nil {
			q = &step{parent: s.queries[e.ParentID]}
			s.queries[e.QueryID] = q
		}
		if rule, ok := e.Node.(*ast.Rule); ok {
			q.rule = rule
			q.exited = q.exited || e.Op == topdown.ExitOp
		}
	}
	for _, q := range s.queries {
		q.aside = q.parent != nil && q.rule == nil // the first has no parent
	}
	return s
}

// own says whether loc is in a file of the policy's author.
func own(loc *ast.Location) bool {
	return loc != nil && loc.File != "" && loc.File != ModuleName
}

// held lists the rules called name that were true.
func (s *steps) held(name string) (sentences []string) {
	for _, e := range s.events {
		rule, ok := e.Node.(*ast.Rule)
		if !ok || e.Op != topdown.ExitOp || rule.Default || !own(rule.Location) || rule.Ref().String() != name {
			continue
		}
		if b, ok := value[ast.Boolean](rule.Head.Value); ok && !bool(b) {
			continue
		}
		sentences = appendOnce(sentences, fmt.Sprintf("%s:%d: %s holds: %s", rule.Location.File, rule.Location.Row, rule.Head.Name, firstLine(rule.Location)))
	}
	return sentences
}

// failed lists the expressions that kept rules from being true. One that failed
// for some values, in a rule that held for others, kept nothing.
func (s *steps) failed() (sentences []string) {
	for _, e := range s.events {
		expr, ok := e.Node.(*ast.Expr)
		if !ok || e.Op != topdown.FailOp || !own(expr.Location) || !s.matters(e.QueryID) {
			continue
		}
		sentence := fmt.Sprintf("%s:%d: does not hold: %s", expr.Location.File, expr.Location.Row, firstLine(expr.Location))
		if values := s.values(expr); values != "" {
			sentence += " (" + values + ")"
		}
		if sentences = appendOnce(sentences, sentence); len(sentences) == 2*maxSentences {
			return append(sentences, "more expressions do not hold")
		}
	}
	return sentences
}

// matters says whether what fails in a query bears on the answer.
func (s *steps) matters(id uint64) bool {
	for q := s.queries[id]; q != nil; q = q.parent {
		if q.aside || q.exited {
			return false
		}
	}
	return true
}

// values says what the input has where the text of expr reads it.
func (s *steps) values(expr *ast.Expr) string {
	body, err := ast.ParseBodyWithOpts(string(expr.Location.Text), ast.ParserOptions{RegoVersion: ast.RegoV1})
	if err != nil || s.input == nil {
		return ""
	}
	var found []string
	ast.WalkRefs(body, func(ref ast.Ref) bool {
		if !ref[0].Equal(ast.InputRootDocument) {
			return false
		}
		read := ref.GroundPrefix()
		if v, err := s.input.Value.Find(read[1:]); err != nil {
			found = appendOnce(found, fmt.Sprintf("%s is undefined", read))
		} else {
			found = appendOnce(found, fmt.Sprintf("%s is %s", read, shorten(v.String(), maxValue)))
		}
		return false
	})
	return strings.Join(found, ", ")
}

func firstLine(loc *ast.Location) string {
	line, more, _ := strings.Cut(strings.TrimSpace(string(loc.Text)), "\n")
	if more != "" {
		line += " …"
	}
	return shorten(line, maxValue)
}

func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

func appendOnce(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// Package engine answers decisions as OPA does: grants, by the fixed module
// merlon.rego, and the policy's own Rego. What can be compiled exactly for the
// called service is decided by its program (package program), all else by OPA,
// under one evaluation limit. An Engine holds one generation of one policy and
// never changes; who follows a policy swaps engines. Whatever goes wrong is a
// denial with a reason.
package engine

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/kept"
)

// EvaluationLimit is how long one decision may take; then it is a denial with
// reason policy.Error (attack T31).
const EvaluationLimit = 50 * time.Millisecond

// Source is one generation of a policy, as bundle.Contents has it.
type Source struct {
	// Modules are Rego files by name. What ModuleName has is for other OPAs:
	// an engine evaluates grants by its own Module, which it is tested with.
	Modules map[string]string
	// Grants have passed grant.Check. The engine keeps what they hold; the caller
	// must not change it afterwards.
	Grants []grant.Grant
	// Audience are the destinations that the policy is for; calls to others are denied
	// NO_BUNDLE. Empty means all.
	Audience []string
	// Generation is recorded in each decision as its Revision.
	Generation uint64
	// NotAfter ends the policy: later calls are denied STALE_POLICY. Zero
	// means never.
	NotAfter time.Time
	// Logger receives failed evaluations; nil discards them.
	Logger *slog.Logger
}

// Engine decides by one generation of a policy. It is safe for concurrent use
// and needs no closing.
type Engine struct {
	program    *compiled
	store      storage.Store
	txn        storage.Transaction // read only, open for the engine's life
	grants     []grant.Grant
	audience   map[string]bool // nil: all
	generation uint64
	notAfter   time.Time
	leaves     index
	ownRego    bool // there are modules beside Module, which may read all input
	dryRun     map[string]*dryRun
	programs   programs
	kept       *kept.Cache // nil where unsteady says why
	unsteady   error
	readsJWT   bool
	parts      parts // of the input, that the policy's own Rego can read
	mismatches atomic.Uint64
	stuck      atomic.Int32 // evaluations that do not stop
	log        *slog.Logger
	now        func() time.Time
	limit      time.Duration // EvaluationLimit, more in tests that are not about it
}

var _ policy.Authorizer = (*Engine)(nil)

// New compiles src. Errors name file, line and reason.
func New(ctx context.Context, src Source) (*Engine, error) {
	grants := slices.Clone(src.Grants)
	slices.SortFunc(grants, func(a, b grant.Grant) int { return strings.Compare(a.ID, b.ID) })
	if err := grant.Check(grants); err != nil {
		return nil, fmt.Errorf("load policy: %w", err)
	}
	e := &Engine{
		grants: grants, generation: src.Generation, notAfter: src.NotAfter,
		ownRego: hasOwnRego(src.Modules), dryRun: map[string]*dryRun{}, log: src.Logger, now: time.Now, limit: EvaluationLimit,
	}
	if len(src.Audience) > 0 {
		e.audience = make(map[string]bool, len(src.Audience))
		for _, destination := range src.Audience {
			e.audience[destination] = true
		}
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	for i := range grants {
		if grants[i].Mode == grant.DryRun {
			e.dryRun[grants[i].ID] = &dryRun{denies: grants[i].Effect == grant.Deny}
		}
	}
	e.leaves = newIndex(grants)
	if err := e.prepare(ctx, src); err != nil {
		return nil, err
	}
	if e.ownRego {
		e.parts = partsOf(e.program.compiler)
	}
	e.keep()
	return e, nil
}

func hasOwnRego(modules map[string]string) bool {
	for name := range modules {
		if name != ModuleName {
			return true
		}
	}
	return false
}

// prepare compiles what is to be evaluated. Grants alone are evaluated by
// Module alone, which reads nothing but its input and is compiled once.
func (e *Engine) prepare(ctx context.Context, src Source) (err error) {
	data := map[string]any{}
	if e.ownRego {
		data["merlon"] = grant.Compile(e.grants)
	}
	e.store = inmem.NewFromObjectWithOpts(data, inmem.OptRoundTripOnWrite(false))
	if e.txn, err = e.store.NewTransaction(ctx); err != nil {
		return fmt.Errorf("load policy: %w", err)
	}
	if !e.ownRego {
		e.program, err = grantsOnly()
		return err
	}
	modules := maps.Clone(src.Modules)
	delete(modules, ModuleName)
	e.program, err = newProgram(modules, func(c *ast.Compiler) {
		c.WithPathConflictsCheck(storage.NonEmpty(ctx, e.store, e.txn))
	})
	return err
}

// Generation is the generation of the policy that e decides by.
func (e *Engine) Generation() uint64 { return e.generation }

// NotAfter is when the policy ends, zero for never.
func (e *Engine) NotAfter() time.Time { return e.notAfter }

// For says whether the policy is for destination, a SPIFFE ID.
func (e *Engine) For(destination string) bool { return e.audience == nil || e.audience[destination] }

// ForOthers says whether the policy names a destination, too, that is not among those
// listed, each of which is there once.
func (e *Engine) ForOthers(listed []string) bool {
	n := 0
	for _, destination := range listed {
		if e.audience[destination] {
			n++
		}
	}
	return n < len(e.audience)
}

// Audience are the destinations that the policy is for, sorted; nil where it is for all.
func (e *Engine) Audience() []string { return slices.Sorted(maps.Keys(e.audience)) }

// Grants is the number of grants of the policy.
func (e *Engine) Grants() int { return len(e.grants) }

// Destinations are the SPIFFE IDs that grants name alone as destinations, sorted.
func (e *Engine) Destinations() []string {
	var ids []string
	for i := range e.grants {
		for _, to := range e.grants[i].To {
			if grant.IsSingle(to) {
				ids = append(ids, to)
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// DryRun returns, by grant ID, how many calls each dry-run grant matched.
func (e *Engine) DryRun() map[string]uint64 {
	counts := make(map[string]uint64, len(e.dryRun))
	for id, n := range e.dryRun {
		counts[id] = n.matched.Load()
	}
	return counts
}

// Authorize decides the call in: by the program of its destination where there
// is one; else by what OPA answered to a call that the policy cannot tell from it;
// else by OPA, which takes at most EvaluationLimit, or as long as ctx allows if that
// is less. All give the same answer.
func (e *Engine) Authorize(ctx context.Context, in *policy.Input) policy.Decision {
	d, a := e.decide(ctx, in)
	d.DryRun = e.differing(d.Reason, a.dryRun)
	return d
}

// AuthorizeByOPA decides the call in by OPA, whatever else could.
func (e *Engine) AuthorizeByOPA(ctx context.Context, in *policy.Input) policy.Decision {
	d, a := e.decideByOPA(ctx, in)
	d.DryRun = e.differing(d.Reason, a.dryRun)
	return d
}

// answer is what the policy said beside the decision.
type answer struct {
	dryRun []string
	err    error
}

func (e *Engine) decide(ctx context.Context, in *policy.Input) (policy.Decision, answer) {
	if in == nil {
		return e.decideByOPA(ctx, in)
	}
	p := e.native(in.Destination)
	if p == nil {
		return e.decideKept(ctx, in)
	}
	v := p.Decide(in, e.now())
	a := answer{dryRun: v.DryRun}
	e.count(v.DryRun)
	if v.Reason == policy.BadRequest {
		a.err = policy.CheckPath(in.Path)
	}
	return policy.Decision{
		Allow: v.Allow(), Reason: v.Reason, RuleID: v.RuleID, DecisionID: policy.NewDecisionID(), Revision: e.generation, Response: v.Response,
	}, a
}

func (e *Engine) decideByOPA(ctx context.Context, in *policy.Input) (policy.Decision, answer) {
	d, a := e.decideAt(ctx, in, e.now(), e.limit)
	e.count(a.dryRun)
	if d.Reason == policy.Error && a.err != nil {
		e.log.LogAttrs(ctx, slog.LevelWarn, "policy evaluation failed", slog.String("decision_id", d.DecisionID.String()),
			slog.Uint64("policy_revision", e.generation), slog.Any("err", a.err))
	}
	return d, a
}

// decideAt is the decision at now: what stands before any policy, and then OPA's.
func (e *Engine) decideAt(ctx context.Context, in *policy.Input, now time.Time, limit time.Duration) (policy.Decision, answer) {
	d := policy.Decision{DecisionID: policy.NewDecisionID(), Revision: e.generation}
	if in == nil || in.Source == "" {
		d.Reason = policy.NoIdentity
		return d, answer{}
	}
	if !e.notAfter.IsZero() && now.After(e.notAfter) {
		d.Reason = policy.StalePolicy
		return d, answer{}
	}
	if !e.For(in.Destination) {
		d.Reason = policy.NoBundle
		return d, answer{}
	}
	if in.Protocol == policy.HTTP || in.Protocol == policy.GRPC {
		if err := policy.CheckPath(in.Path); err != nil {
			d.Reason = policy.BadRequest
			return d, answer{err: err}
		}
	}
	a := e.evaluate(ctx, in, now, limit, &d)
	if a.err != nil {
		d.Allow, d.Reason, d.RuleID, d.Response = false, policy.Error, "", nil
	}
	return d, a
}

// count counts a match of each of these dry-run grants.
func (e *Engine) count(dryRun []string) {
	for _, id := range dryRun {
		if n := e.dryRun[id]; n != nil {
			n.matched.Add(1)
		}
	}
}

// dryRun is one dry-run grant.
type dryRun struct {
	denies  bool
	matched atomic.Uint64
}

// differing are those of the matching dry-run grants that would have decided
// otherwise than for reason.
func (e *Engine) differing(reason policy.Reason, matching []string) []string {
	var allows, denies []string
	for _, id := range matching {
		if g := e.dryRun[id]; g != nil && g.denies {
			denies = append(denies, id)
		} else {
			allows = append(allows, id)
		}
	}
	return policy.Differing(reason, allows, denies)
}

// evaluate fills d from the policy's answer, which may take as long as limit.
func (e *Engine) evaluate(ctx context.Context, in *policy.Input, now time.Time, limit time.Duration, d *policy.Decision) (a answer) {
	defer func() {
		// A policy that finds a bug in OPA must not stop the enforcement point.
		if r := recover(); r != nil {
			a.err = fmt.Errorf("evaluate policy: panic: %v", r)
		}
	}()
	w, err := e.watch(ctx, limit)
	if err != nil {
		return answer{err: fmt.Errorf("evaluate policy: %w", err)}
	}
	defer w.over()
	call := e.lookUp(in, now)
	q := &e.program.decides
	if call.dryRun != nil {
		q = &e.program.decidesAndRecords
	}
	result, err := e.ask(ctx, q, e.input(in, &call), now, w)
	switch {
	case topdown.IsCancel(err):
		return answer{err: fmt.Errorf("evaluate policy: %w after %v", errStopped, limit)}
	case err != nil:
		return answer{err: fmt.Errorf("evaluate policy: %v", err)}
	case result == nil:
		return answer{err: errors.New("evaluate policy: no decision")}
	}
	return e.read(result, d)
}

// ask puts one question to the policy.
func (e *Engine) ask(ctx context.Context, q *query, document *ast.Term, now time.Time, cancel topdown.Cancel) (result topdown.QueryResult, err error) {
	err = topdown.NewQuery(q.body).
		WithQueryCompiler(q.compiler).
		WithCompiler(e.program.compiler).
		WithStore(e.store).
		WithTransaction(e.txn).
		WithInput(document).
		WithTime(now).
		WithCancel(cancel).
		WithMetrics(metrics.NoOp()).
		WithStrictBuiltinErrors(true). // an error in a deny rule must not pass for "does not deny"
		Iter(ctx, func(r topdown.QueryResult) error {
			if result != nil {
				return errors.New("more than one decision")
			}
			result = r
			return nil
		})
	return result, err
}

// read takes d and the dry-run matches from what Module says.
func (e *Engine) read(result topdown.QueryResult, d *policy.Decision) (a answer) {
	verdict, ok := value[*ast.Array](result[verdictVar])
	if !ok || verdict.Len() != 2 {
		return answer{err: errors.New("evaluate policy: malformed decision")}
	}
	reason, ok1 := value[ast.String](verdict.Elem(0))
	rule, ok2 := value[ast.String](verdict.Elem(1))
	dryRun, ok3 := value[*ast.Array](result[dryRunVar])
	if !ok1 || !ok2 || !ok3 && result[dryRunVar] != nil {
		return answer{err: errors.New("evaluate policy: malformed decision")}
	}
	var err error
	if d.Response, err = readResponse(result[responseVar]); err != nil {
		return answer{err: fmt.Errorf("evaluate policy: the object that allow is: %w", err)}
	}
	d.Reason, d.RuleID = policy.Reason(reason), string(rule)
	d.Allow = d.Reason == policy.Allowed
	if dryRun == nil {
		return answer{}
	}
	dryRun.Foreach(func(t *ast.Term) {
		id, _ := value[ast.String](t)
		a.dryRun = append(a.dryRun, string(id))
	})
	return a
}

func value[T ast.Value](t *ast.Term) (v T, ok bool) {
	if t != nil {
		v, ok = t.Value.(T)
	}
	return v, ok
}

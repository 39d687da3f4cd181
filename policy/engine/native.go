package engine

// This file makes the program of a destination: the grants that name it, and the
// policy's own Rego, evaluated as far as it can be without a call. What remains
// is read by package residual. A policy that cannot be put into a program exactly is
// decided by OPA, and the error says why.

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
	"merlon.dev/policy/engine/residual"
	"merlon.dev/policy/grant"
	"merlon.dev/policy/program"
)

// partialLimit is how long evaluation without a call may take, for one
// destination.
const partialLimit = time.Second

// programSource is what the program for destination is made from.
func (e *Engine) programSource(ctx context.Context, destination string) (src program.Source, err error) {
	defer noPanic(&err)
	if !e.For(destination) {
		return program.Source{}, &residual.NotNative{Reason: "the policy bundle is not for " + destination}
	}
	src = program.Source{Destination: destination, Generation: e.generation, NotAfter: e.notAfter}
	for i := range e.grants {
		g := &e.grants[i]
		if g.To == nil || slices.ContainsFunc(g.To, func(to string) bool { return grant.MatchSPIFFEID(to, destination) }) {
			src.Grants = append(src.Grants, nativeGrant(g))
		}
	}
	if !e.ownRego {
		return src, nil
	}
	compiler, err := e.program.forPrograms()
	if err != nil {
		return program.Source{}, err
	}
	if src.Deny, err = e.remaining(ctx, compiler, "deny", destination); err != nil {
		return program.Source{}, err
	}
	if residual.AnswersObjects(e.program.compiler) {
		err = e.answers(ctx, compiler, &src)
		return src, err
	}
	src.Allow, err = e.remaining(ctx, compiler, "allow", destination)
	return src, err
}

// answers is what allow answers where that can be an object, and to which calls.
func (e *Engine) answers(ctx context.Context, c *ast.Compiler, src *program.Source) error {
	either := program.Expr{Op: program.Or}
	for _, a := range residual.Answers(e.program.compiler) {
		r := program.Response{Allow: a.Allows()}
		if object, ok := a.Value.(ast.Object); ok {
			var err error
			if r.Send, err = responseOf(object); err != nil {
				return fmt.Errorf("the object that %s is: %v", a.Rule, err)
			}
		}
		if !a.Default {
			when, err := e.whereTrue(ctx, c, ast.NewBody(ast.Equality.Expr(ast.NewTerm(a.Rule), ast.NewTerm(a.Value))), src.Destination)
			if err != nil {
				return err
			}
			when = residual.Simplify(when)
			r.When = &when
			if r.Allow {
				either.Of = append(either.Of, when)
			}
		}
		src.Responses = append(src.Responses, r)
	}
	simple := residual.Simplify(either)
	src.Allow = &simple
	return nil
}

func nativeGrant(g *grant.Grant) program.Grant {
	n := program.Grant{ID: g.ID, Kind: program.Allow, Protocol: g.Protocol(), From: g.From}
	switch {
	case g.Mode == grant.DryRun && g.Effect == grant.Deny:
		n.Kind = program.DryRunDeny
	case g.Mode == grant.DryRun:
		n.Kind = program.DryRun
	case g.Effect == grant.Deny:
		n.Kind = program.Deny
	}
	if g.Expires != nil {
		if n.Expires = grant.UnixNano(*g.Expires); n.Expires == 0 { // which would be never
			n.Expires = -1
		}
	}
	switch {
	case g.HTTP != nil:
		n.Methods = g.HTTP.Methods
		for _, p := range g.HTTP.Paths {
			n.Paths = append(n.Paths, nativePath(p))
		}
	case g.GRPC != nil:
		n.Methods = g.GRPC.Methods
		for _, service := range g.GRPC.Services {
			n.Paths = append(n.Paths, program.Path{Text: service})
		}
	}
	return n
}

func nativePath(pattern string) program.Path {
	base, more := strings.CutSuffix(pattern, "/*")
	if !strings.Contains(base, "{") {
		return program.Path{Text: policy.DecodePath(base), More: more}
	}
	p := program.Path{More: more}
	for _, part := range strings.Split(base, "/")[1:] {
		if strings.HasPrefix(part, "{") {
			p.Parts = append(p.Parts, program.Part{Free: true})
		} else {
			p.Parts = append(p.Parts, program.Part{Text: policy.DecodePath(part)})
		}
	}
	return p
}

// unknown are the parts of the input that a call decides; all others, known holds.
var unknown = func() (terms []*ast.Term) {
	for _, ref := range []string{
		"input.attributes.source", "input.attributes.destination.address", "input.attributes.request",
		"input.protocol", "input.spiffe.source", "input.parsed_path", "input.parsed_query", "input.grpc", "input.jwt",
	} {
		terms = append(terms, ast.MustParseTerm(ref))
	}
	return terms
}()

// known is the input as far as the destination decides it.
func known(destination string) *ast.Term {
	return object(
		field{"attributes", object(field{"destination", object(field{"principal", text(destination)})})},
		field{"spiffe", object(field{"destination", spiffe(destination)})},
		field{"parsed_body", ast.NullTerm()},
		field{"truncated_body", ast.InternedTerm(false)},
	)
}

// remaining is what is left of the rules called name in the packages that are
// asked.
func (e *Engine) remaining(ctx context.Context, c *ast.Compiler, name, destination string) (*program.Expr, error) {
	either := program.Expr{Op: program.Or}
	for _, pkg := range []string{"data.authz", "data.envoy.authz"} {
		one, err := e.whereTrue(ctx, c, ast.MustParseBody(fmt.Sprintf("%s.%s == true", pkg, name)), destination)
		if err != nil {
			return nil, err
		}
		either.Of = append(either.Of, one)
	}
	simple := residual.Simplify(either)
	return &simple, nil
}

// whereTrue is for which calls the question is true.
func (e *Engine) whereTrue(ctx context.Context, c *ast.Compiler, question ast.Body, destination string) (program.Expr, error) {
	bodies, support, err := e.partial(ctx, c, question, destination)
	if err != nil {
		return program.Expr{}, err
	}
	return residual.Translate(bodies, support)
}

func (e *Engine) partial(ctx context.Context, c *ast.Compiler, question ast.Body, destination string) ([]ast.Body, []*ast.Module, error) {
	var bodies []ast.Body
	var support []*ast.Module
	var err error
	open := newUnended()
	late := e.inTime(ctx, partialLimit, func(cancel topdown.Cancel) {
		var q query
		if q, err = newQuery(c, question); err != nil {
			return
		}
		bodies, support, err = topdown.NewQuery(q.body).
			WithQueryCompiler(q.compiler).
			WithCompiler(c).
			WithStore(e.store).
			WithTransaction(e.txn).
			WithInput(known(destination)).
			WithUnknowns(unknown).
			WithPartialNamespace(residual.Namespace).
			WithCancel(cancel).
			WithMetrics(metrics.NoOp()).
			WithStrictBuiltinErrors(true).
			WithQueryTracer(open).
			PartialRun(ctx)
	})
	switch {
	case late != nil:
		return nil, nil, fmt.Errorf("evaluation without a call: %v", late)
	case topdown.IsCancel(err):
		return nil, nil, errors.New("what remains of it without a call takes too long to find")
	case err != nil:
		return nil, nil, fmt.Errorf("evaluation without a call fails: %v", err)
	}
	if at, found := open.last(); found {
		return nil, nil, residual.Failed(at)
	}
	return bodies, support, nil
}

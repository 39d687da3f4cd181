package engine

// This file says what of a policy its tests have reached: which grants decided a call,
// and which lines of own Rego were evaluated, as OPA counts them.

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/cover"

	"merlon.dev/policy"
)

// Coverage gathers what tests reach. It is not safe for concurrent use.
type Coverage struct {
	engine  *Engine
	source  Source
	lines   *cover.Cover
	decided map[string]bool // by grant ID
}

// NewCoverage is for the tests of the policy src, which e decides by.
func NewCoverage(e *Engine, src Source) *Coverage {
	return &Coverage{engine: e, source: src, lines: cover.New(), decided: map[string]bool{}}
}

// CoverageReport is what tests reached. Percent is 100 where there is nothing to reach.
type CoverageReport struct {
	Grants GrantCoverage `json:"grants"`
	Rego   RegoCoverage  `json:"rego"`
}

// GrantCoverage counts grants that decided the call of at least one test in
// grants_test.yaml, or in mode dry-run matched it.
type GrantCoverage struct {
	Percent    float64  `json:"percent"`
	Covered    int      `json:"covered"`
	Of         int      `json:"of"`
	NotCovered []string `json:"not_covered"`
}

// RegoCoverage counts lines of own Rego that were evaluated in at least one test.
type RegoCoverage struct {
	Percent    float64  `json:"percent"`
	Covered    int      `json:"covered"`
	Of         int      `json:"of"`
	NotCovered []string `json:"not_covered"` // "authz.rego:12", "authz.rego:14-16"
}

// call notes what decided the call in, and which lines OPA evaluates for it.
func (c *Coverage) call(ctx context.Context, in *policy.Input, x *Explanation) {
	c.decided[x.RuleID] = true
	for _, id := range x.Tried {
		c.decided[id] = true
	}
	if c.engine.ownRego && x.Reason != policy.BadRequest && x.Reason != policy.NoIdentity {
		// How it comes out has been seen; an error has its lines, too.
		_ = c.engine.traced(ctx, in, time.Now(), &c.engine.program.decides, c.lines, false)
	}
}

// Report is what was reached so far. The error is about Rego that does not parse.
func (c *Coverage) Report() (*CoverageReport, error) {
	r := &CoverageReport{Grants: GrantCoverage{NotCovered: []string{}}, Rego: RegoCoverage{NotCovered: []string{}}}
	for i := range c.engine.grants {
		if id := c.engine.grants[i].ID; c.decided[id] {
			r.Grants.Covered++
		} else {
			r.Grants.NotCovered = append(r.Grants.NotCovered, id)
		}
	}
	r.Grants.Of = len(c.engine.grants)
	r.Grants.Percent = percent(r.Grants.Covered, r.Grants.Of)
	modules := map[string]*ast.Module{}
	for name, text := range c.source.Modules {
		if name == ModuleName {
			continue
		}
		m, err := parseModule(name, text)
		if err != nil {
			return nil, err
		}
		modules[name] = m
	}
	lines := c.lines.Report(modules)
	for _, name := range slices.Sorted(maps.Keys(modules)) {
		file := lines.Files[name]
		r.Rego.Covered += file.CoveredLines
		r.Rego.Of += file.CoveredLines + file.NotCoveredLines
		for _, part := range file.NotCovered {
			where := fmt.Sprintf("%s:%d", name, part.Start.Row)
			if part.End.Row > part.Start.Row {
				where += fmt.Sprintf("-%d", part.End.Row)
			}
			r.Rego.NotCovered = appendOnce(r.Rego.NotCovered, where)
		}
	}
	r.Rego.Percent = percent(r.Rego.Covered, r.Rego.Of)
	return r, nil
}

func percent(part, of int) float64 {
	if of == 0 {
		return 100
	}
	return 100 * float64(part) / float64(of)
}

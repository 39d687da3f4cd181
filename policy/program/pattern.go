package program

// This file bounds regular expressions: the instructions of one, each of which may be
// taken for each byte of a text. A call that would take more is an error, here as where
// OPA decides.

import (
	"regexp/syntax"
	"slices"
	"sync"
)

const (
	// MaxSteps is how many instructions × bytes one match may take.
	MaxSteps = 8 << 20
	// MaxPatternCost is that of the largest expression in a program. A name, a number, a
	// UUID cost up to 50.
	MaxPatternCost = 500
)

// patternCosts remembers them, up to maxPatterns.
var patternCosts = struct {
	sync.Mutex
	known map[string]int
}{known: map[string]int{}}

const (
	maxPatterns     = 1000
	maxPatternBytes = 1 << 16
)

// PatternCost is the number of instructions of pattern, at least its length where that
// is too long to look at; 1 for a malformed one, which fails by itself.
func PatternCost(pattern string) int {
	if len(pattern) > maxPatternBytes {
		return len(pattern)
	}
	patternCosts.Lock()
	cost, known := patternCosts.known[pattern]
	patternCosts.Unlock()
	if known {
		return cost
	}
	cost = 1
	if parsed, err := syntax.Parse(pattern, syntax.Perl); err == nil {
		if compiled, err := syntax.Compile(parsed.Simplify()); err == nil {
			cost = len(compiled.Inst)
		}
	}
	patternCosts.Lock()
	defer patternCosts.Unlock()
	if len(patternCosts.known) >= maxPatterns {
		clear(patternCosts.known)
	}
	patternCosts.known[pattern] = cost
	return cost
}

// matches is e.pattern on a; what takes too long fails the decision.
func (e *Expr) matches(a string, at *elements) bool {
	if len(a) > e.longest {
		at.failed = true
		return false
	}
	return e.pattern.MatchString(a)
}

// fallible says whether some condition in e can fail.
func (e *Expr) fallible() bool {
	return e.Op == Matches || slices.ContainsFunc(e.Of, func(part Expr) bool { return part.fallible() })
}

// The settings of retries: which requests are tried once more, and how many at the same
// time.

package sidecar

import (
	"fmt"
	"slices"
	"strings"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// Retry is when a request is tried once more, at another upstream where there is one: if
// none could be connected to, if an upstream says that it has not begun with it, or if
// it closed a kept connection just as it was used and the method is idempotent. Never
// after a denial or any other answer, and never after some of a body that is not at
// hand any more was sent.
type Retry struct {
	// Attempts are how many tries a request has at most, the first included. Zero means
	// 3; 1 means that nothing is tried again.
	Attempts int `yaml:"attempts"`
	// Methods are idempotent ones that are tried again also where an upstream broke off
	// before its answer began, and may have done what was asked.
	Methods []string `yaml:"methods"`
	// BudgetPercent is how many of the requests under way to the upstreams may be further
	// tries. Zero means 20.
	BudgetPercent int `yaml:"budget_percent"`
	// BudgetFloor is how many may be where that is less. Zero means 10.
	BudgetFloor int `yaml:"budget_floor"`
}

func (r Retry) withDefaults() Retry {
	if r.Attempts == 0 {
		r.Attempts = 3
	}
	if r.BudgetPercent == 0 {
		r.BudgetPercent = 20
	}
	if r.BudgetFloor == 0 {
		r.BudgetFloor = 10
	}
	return r
}

func (r Retry) validate(field, protocol string) error {
	r = r.withDefaults()
	for _, f := range []struct {
		field    string
		value    int
		min, max int
	}{
		{"attempts", r.Attempts, 1, 100},
		{"budget_percent", r.BudgetPercent, 1, 100},
		{"budget_floor", r.BudgetFloor, 1, maxLimit},
	} {
		if f.value < f.min || f.value > f.max {
			return &InvalidError{Field: field + "." + f.field, Reason: fmt.Sprintf("%d is not between %d and %d", f.value, f.min, f.max)}
		}
	}
	for i, method := range r.Methods {
		if !hop.IsIdempotent(method) {
			return &InvalidError{
				Field: fmt.Sprintf("%s.methods[%d]", field, i), Reason: fmt.Sprintf("%q is not idempotent: done twice it is something else", method),
				Hint: "of GET, HEAD, OPTIONS, TRACE, PUT, DELETE",
			}
		}
	}
	if len(r.Methods) > 0 && !strings.HasPrefix(protocol, "http") {
		return &InvalidError{Field: field + ".methods", Reason: fmt.Sprintf("is not for protocol %s", protocol)}
	}
	return nil
}

// hop is the part of each request.
func (r Retry) hop() hop.Retry {
	r = r.withDefaults()
	return hop.Retry{Attempts: r.Attempts, Methods: slices.Clone(r.Methods)}
}

// budget is the part of the upstreams, for all listeners that lead there.
func (r Retry) budget() hop.Budget {
	r = r.withDefaults()
	return hop.Budget{Percent: r.BudgetPercent, Floor: r.BudgetFloor}
}

// ofUpstreams are the settings without those of each request.
func (r Retry) ofUpstreams() Retry {
	return Retry{BudgetPercent: r.BudgetPercent, BudgetFloor: r.BudgetFloor}
}

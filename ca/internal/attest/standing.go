// An agent's standing: whether its node may act. Every kind of evidence goes
// through enroll, and every call of an agent through the record, so that nothing
// that a node can show gets past it.

package attest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/store"
)

// Standing is what an operator has decided about an agent.
type Standing string

// The standings.
const (
	// Good is that of an agent about which nobody has decided anything.
	Good Standing = ""
	// Evicted: its SVID counts for nothing, and it may attest anew.
	Evicted Standing = "evicted"
	// Banned: it may not attest either, whatever it shows.
	Banned Standing = "banned"
)

// What an agent without good standing is told.
var (
	ErrEvicted = errors.New("the agent was evicted: its node has to attest anew")
	ErrBanned  = errors.New("the agent is banned: its node may not attest, until an operator lifts that (merlon agent unban)")
)

// StandingError says why an operator's decision does not apply.
type StandingError struct{ ID, Reason string }

// Error implements error.
func (e *StandingError) Error() string { return e.ID + " " + e.Reason }

// Fault is nil for an agent that may act.
func (a *Agent) Fault() error {
	switch a.Standing {
	case Good:
		return nil
	case Evicted:
		return ErrEvicted
	default:
		return ErrBanned
	}
}

// Decision is what an operator wants of an agent.
type Decision struct {
	// From are the standings that it can be taken from, To that which it leads to.
	// Refusal says what is wrong with any other.
	From    []Standing
	To      Standing
	Refusal string
	Note    string
	Now     time.Time
	// With returns what is written in the same transaction; nil: nothing is.
	With func(*Agent) (store.Op, error)
}

// Decide carries d out in one transaction with whatever belongs to it, and returns
// the agent as it is then.
func Decide(ctx context.Context, st store.Store, id spiffeid.ID, d Decision) (*Agent, error) {
	return change(ctx, st, id, func(a *Agent) ([]store.Op, error) {
		if !slices.Contains(d.From, a.Standing) {
			return nil, &StandingError{id.String(), d.Refusal}
		}
		a.Standing, a.StandingSince, a.StandingNote = d.To, d.Now, d.Note
		if d.With == nil {
			return nil, nil
		}
		op, err := d.With(a)
		if err != nil {
			return nil, err
		}
		return []store.Op{op}, nil
	})
}

func checkStanding(s Standing) error {
	switch s {
	case Good, Evicted, Banned:
		return nil
	}
	return fmt.Errorf("standing %q is not known", s)
}

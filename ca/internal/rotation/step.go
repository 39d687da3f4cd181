// The steps: each takes a set on to the next, or says why not. Two laws hold,
// which TestRotationLaws tries out:
//
// There is always a key that signs: one root in all, one JWT key in each place
// that had one; it is in the trust bundle, and a root does not sign past its
// end once what is due is done.
//
// Without force no key begins to sign while an agent that counts has not
// acknowledged a trust bundle with it, and none is withdrawn while somebody has
// an SVID under it that was not replaced. The one exception is a root from the
// last call of the one before on (Policy.LastCall): then it signs, whoever lacks
// it, because with the root before every SVID ends.

package rotation

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// ErrUnknown is returned when there is no authority with the given ID.
var ErrUnknown = errors.New("no such authority")

// Verb is what is done to an authority.
type Verb string

// The verbs. Prepare adds what Command.New is.
const (
	Prepare  Verb = "prepare"
	Publish  Verb = "publish"
	Activate Verb = "activate"
	Taint    Verb = "taint"
	Revoke   Verb = "revoke"
	Forget   Verb = "forget"
)

// Command is one step that somebody wants.
type Command struct {
	Verb Verb
	ID   string
	// New is what Prepare adds. Due leaves it out, and says by Kind what key is to
	// be made.
	New  *Authority
	Kind Kind
	// Force goes over what the step waits for.
	Force bool
}

// RefusedError says why a step is not taken.
type RefusedError struct {
	Verb   Verb
	ID     string
	Reason string
	Wait   Wait // what Force would go over; zero where nothing helps
}

// Error implements error.
func (e *RefusedError) Error() string { return fmt.Sprintf("%s %s: %s", e.Verb, e.ID, e.Reason) }

// Step takes s on by one command. Every error but ErrUnknown is a *RefusedError.
func Step(s Set, c Command, v View, p Policy, now time.Time) (Set, error) {
	next := s.clone()
	if c.Verb == Prepare {
		return next.prepare(c, now)
	}
	a, ok := next.Get(c.ID)
	if !ok {
		return s, fmt.Errorf("%s %.80q: %w", c.Verb, c.ID, ErrUnknown)
	}
	var err error
	switch c.Verb {
	case Publish:
		err = a.publish(now)
	case Activate:
		err = next.activate(a, c, v, p, now)
	case Taint:
		err = a.taint(now)
	case Revoke:
		err = next.revoke(a, c, v, p, now)
	case Forget:
		if a.State != Revoked {
			err = refused(c, "it is %s, and only what is revoked is forgotten", a.State)
		}
		next.all = slices.DeleteFunc(next.all, func(x Authority) bool { return x.ID == c.ID })
	default:
		err = refused(c, "there is no such step")
	}
	if err != nil {
		return s, err
	}
	return next, nil
}

func refused(c Command, format string, args ...any) error {
	return &RefusedError{Verb: c.Verb, ID: c.ID, Reason: fmt.Sprintf(format, args...)}
}

// enter puts a into a state.
func (a *Authority) enter(s State, now time.Time) {
	if a.Since == nil {
		a.Since = make(map[State]time.Time)
	}
	a.State, a.Since[s] = s, now.UTC()
}

func (s Set) prepare(c Command, now time.Time) (Set, error) {
	a := *c.New
	c.ID = a.ID
	if known, taken := s.Get(a.ID); taken && known.State == Revoked {
		return s, refused(c, "it was revoked, and never signs again: make another key")
	} else if taken {
		return s, refused(c, "it is there already")
	}
	if err := s.Room(a.Kind, a.Replica); err != nil {
		return s, err
	}
	a.Since, a.Sequence = nil, 0
	a.enter(Prepared, now)
	if err := a.check(); err != nil {
		return s, refused(c, "%v", err)
	}
	if a.Ended(now) {
		return s, refused(c, "its life is over")
	}
	s.all = append(s.all, a)
	return s, nil
}

func (a *Authority) publish(now time.Time) error {
	if a.State != Prepared {
		return refused(Command{Verb: Publish, ID: a.ID}, "it is %s already", a.State)
	}
	a.enter(Published, now)
	a.Sequence = 0 // Stamped knows it
	return nil
}

// activate lets a sign, and whatever signed in its place be old. An old one can
// come back: everybody knows it.
func (s Set) activate(a *Authority, c Command, v View, p Policy, now time.Time) error {
	switch {
	case a.State == Prepared:
		return refused(c, "it is in no trust bundle yet")
	case a.State != Published && a.State != Old:
		return refused(c, "it is %s", a.State)
	case a.Ended(now):
		return refused(c, "its life is over since %s", a.NotAfter.UTC().Format(time.RFC3339))
	}
	if w := s.activation(a, v, p, now); !w.Over(now) && !c.Force {
		return &RefusedError{Verb: c.Verb, ID: c.ID, Reason: w.String(), Wait: w}
	}
	if before := s.active(a.slot()); before != nil {
		before.enter(Old, now)
	}
	a.enter(Active, now)
	return nil
}

func (a *Authority) taint(now time.Time) error {
	c := Command{Verb: Taint, ID: a.ID}
	switch a.State {
	case Old:
		a.enter(Tainted, now)
		a.Sequence = 0
		return nil
	case Active:
		return refused(c, "it signs: prepare and activate another one first")
	case Prepared, Published:
		return refused(c, "it has signed nothing: revoke it")
	}
	return refused(c, "it is %s", a.State)
}

func (s Set) revoke(a *Authority, c Command, v View, p Policy, now time.Time) error {
	switch a.State {
	case Active:
		return refused(c, "it signs: prepare and activate another one first")
	case Revoked:
		return refused(c, "it is revoked")
	}
	if w := s.revocation(a, v, p, now); !w.Over(now) && !c.Force {
		reason := w.String()
		if a.State == Old {
			reason = "what it has signed is alive: " + reason + "; taint it, and it is replaced at once"
		}
		return &RefusedError{Verb: c.Verb, ID: c.ID, Reason: reason, Wait: w}
	}
	a.enter(Revoked, now)
	return nil
}

// Enrolled returns the set with a key that signs from now on: the first of a store,
// or one in place of a key that is lost.
func (s Set) Enrolled(a Authority, now time.Time) (Set, error) {
	return s.entered(a, now, Publish, Activate)
}

// Joined returns the set with the key of a replica that joins, which waits to be
// acknowledged like any other.
func (s Set) Joined(a Authority, now time.Time) (Set, error) { return s.entered(a, now, Publish) }

func (s Set) entered(a Authority, now time.Time, verbs ...Verb) (Set, error) {
	next, err := Step(s, Command{Verb: Prepare, New: &a}, View{}, Policy{}, now)
	if err != nil {
		return s, err
	}
	for _, verb := range verbs {
		if next, err = Step(next, Command{Verb: verb, ID: a.ID, Force: true}, View{}, Policy{}, now); err != nil {
			return s, err
		}
	}
	return next, nil
}

// Evicted returns the set without trust in any JWT key of replica, whose
// authorities are all withdrawn.
func (s Set) Evicted(replica string, now time.Time) Set {
	next := s.clone()
	for i := range next.all {
		if a := &next.all[i]; a.Kind == JWT && a.Replica == replica && a.State != Revoked {
			a.enter(Revoked, now)
		}
	}
	return next
}

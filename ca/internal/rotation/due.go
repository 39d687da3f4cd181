// What happens by itself: authorities are replaced at half of their life, and
// leave when what they have signed has expired.

package rotation

import "time"

// Pending is a step that somebody waits for, with what it waits for.
type Pending struct {
	ID   string
	Next Verb
	Wait Wait
}

// Waiting returns the next step of each authority on its way, whoever takes it.
func Waiting(s Set, v View, p Policy, now time.Time) (pending []Pending) {
	for i := range s.all {
		switch a := &s.all[i]; a.State {
		case Prepared:
			pending = append(pending, Pending{a.ID, Publish, Wait{}})
		case Published:
			pending = append(pending, Pending{a.ID, Activate, s.activation(a, v, p, now)})
		case Old, Tainted:
			pending = append(pending, Pending{a.ID, Revoke, s.revocation(a, v, p, now)})
		}
	}
	return pending
}

// Endangered returns the step of the root that is to sign next where the one that
// signs has an eighth of its life left, and something is still waited for.
func Endangered(s Set, v View, p Policy, now time.Time) (Pending, bool) {
	root := s.Root()
	if root == nil || root.NotAfter.Sub(now) > root.NotAfter.Sub(root.NotBefore)/8 {
		return Pending{}, false
	}
	for _, next := range Waiting(s, v, p, now) {
		if a, ok := s.Get(next.ID); ok && a.Kind == Root && next.Next == Activate && !next.Wait.Over(now) {
			return next, true
		}
	}
	return Pending{}, false
}

// Due returns what is to be done now by replica, of its own JWT keys, and, if it
// replaces the roots, of those: the steps hold in the order given. An
// authority that an operator has prepared is not activated before its time;
// he can do that.
func Due(s Set, replica string, roots bool, v View, p Policy, now time.Time) (due []Command) {
	slots := []slot{{JWT, replica}}
	if roots {
		slots = append(slots, slot{kind: Root})
	}
	for _, place := range slots {
		due = append(due, s.dueIn(place, v, p, now)...)
	}
	return append(due, s.forgotten(replica, roots, p, now)...)
}

// forgotten leave the list: what has been revoked for long, and the first of
// too many.
func (s Set) forgotten(replica string, roots bool, p Policy, now time.Time) (due []Command) {
	tooMany := -maxRevoked
	for _, a := range s.all {
		if a.State == Revoked {
			tooMany++
		}
	}
	for _, a := range s.all {
		if a.State != Revoked || !roots && a.Replica != replica {
			continue
		}
		if tooMany > 0 || !now.Before(a.Since[Revoked].Add(p.Keep)) {
			due = append(due, Command{Verb: Forget, ID: a.ID})
			tooMany--
		}
	}
	return due
}

func (s Set) dueIn(place slot, v View, p Policy, now time.Time) (due []Command) {
	active := s.active(place)
	replace := active == nil || active.pastHalf(now)
	successor := false
	for i := range s.all {
		a := &s.all[i]
		if a.slot() != place {
			continue
		}
		switch {
		case a.State == Prepared:
			due = append(due, Command{Verb: Publish, ID: a.ID})
			successor = true
		// Nobody wanted it; but a successor that is waited for is not withdrawn.
		case a.State == Published && (a.Ended(now) || a.pastHalf(now) && !replace):
			due = append(due, Command{Verb: Revoke, ID: a.ID})
		case a.State == Published:
			if replace && !successor && s.activation(a, v, p, now).Over(now) {
				due = append(due, Command{Verb: Activate, ID: a.ID})
			}
			successor = true
		case a.State == Old || a.State == Tainted:
			if s.expired(a, v, p, now) {
				due = append(due, Command{Verb: Revoke, ID: a.ID})
			}
		}
	}
	if replace && !successor {
		due = append(due, Command{Verb: Prepare, Kind: place.kind})
	}
	return due
}

// expired says whether nothing that a has signed lives. A tainted authority
// that somebody still needs is the operator's to revoke.
func (s Set) expired(a *Authority, v View, p Policy, now time.Time) bool {
	return len(v.signing(a)) == 0 && !now.Before(v.lastUse(a, p))
}

// Package rotation decides how the keys of the CA follow each other: which
// authority is prepared, published, active, old, tainted or revoked, what each
// step waits for, and which steps are due by themselves. It is pure: it knows
// no store, no clock and no key, only what is written down about each.
package rotation

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// Kind is what an authority signs.
type Kind string

// The kinds of authorities. Roots and JWT keys are in the trust bundle, and
// here; an intermediate travels in the chain, and belongs to the record of its
// replica.
const (
	Root         Kind = "x509-root"
	Intermediate Kind = "x509-intermediate"
	JWT          Kind = "jwt"
)

// State is where an authority is in its life.
type State string

// The states, in order.
const (
	Prepared  State = "prepared"  // the key is made; nobody knows it
	Published State = "published" // in the trust bundle; signs nothing yet
	Active    State = "active"    // signs
	Old       State = "old"       // in the trust bundle for what it has signed
	Tainted   State = "tainted"   // and what it has signed is being replaced
	Revoked   State = "revoked"   // out of the trust bundle
)

// Trusted says whether an authority in this state is in the trust bundle.
func (s State) Trusted() bool { return s == Published || s == Active || s == Old || s == Tainted }

// Authority is what is known of one signing key. Nothing of it is secret.
type Authority struct {
	// ID is the hex subject key ID of a root, or the kid of a JWT key.
	ID    string `json:"id"`
	Kind  Kind   `json:"kind"`
	State State  `json:"state"`
	// Replica holds the key.
	Replica string `json:"replica"`
	// Certificate is a root's, DER; PublicKey is a JWT key's, PKIX, DER.
	Certificate []byte `json:"certificate,omitempty"`
	PublicKey   []byte `json:"public_key,omitempty"`
	// NotBefore and NotAfter are its life. A JWT key has no end of its own:
	// NotAfter is when it should be gone.
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	// Seal is the signature of the root SealedBy over a root's certificate: by
	// it replicas know that the root follows, and is nobody else's.
	Seal     []byte `json:"seal,omitempty"`
	SealedBy string `json:"sealed_by,omitempty"`
	// Sequence is that of the trust bundle that carries the key first, or names
	// it as tainted: what agents have to acknowledge before the next step.
	Sequence uint64 `json:"sequence,omitempty"`
	// Since says when it came into each state that it has been in.
	Since map[State]time.Time `json:"since"`
}

// Ended says whether the authority's life is over at now.
func (a *Authority) Ended(now time.Time) bool { return !now.Before(a.NotAfter) }

// pastHalf says whether half of its life is over.
func (a *Authority) pastHalf(now time.Time) bool {
	return now.After(a.NotBefore.Add(a.NotAfter.Sub(a.NotBefore) / 2))
}

// Set is all authorities, in the order in which they came. It is not changed:
// each step returns another.
type Set struct{ all []Authority }

// All returns the authorities. Do not change them.
func (s Set) All() []Authority { return s.all }

// Get returns the authority with the given ID.
func (s Set) Get(id string) (*Authority, bool) {
	for i := range s.all {
		if s.all[i].ID == id {
			return &s.all[i], true
		}
	}
	return nil, false
}

// Root returns the active root; nil if there is none.
func (s Set) Root() *Authority { return s.active(slot{kind: Root}) }

// JWT returns the active JWT key of replica; nil if there is none.
func (s Set) JWT(replica string) *Authority { return s.active(slot{JWT, replica}) }

func (s Set) active(place slot) *Authority {
	for i := range s.all {
		if a := &s.all[i]; a.State == Active && a.slot() == place {
			return a
		}
	}
	return nil
}

// Standing says, for people and to be compared, where the authority with the given
// ID stands, and what signs in its place; empty: there is none.
func (s Set) Standing(id string) string {
	a, ok := s.Get(id)
	if !ok {
		return ""
	}
	text := fmt.Sprintf("%s %s of %s is %s since %s", a.Kind, a.ID, a.Replica, a.State, a.Since[a.State].UTC().Format(time.RFC3339Nano))
	if signs := s.active(a.slot()); signs != nil && signs.ID != id {
		text += ", and " + signs.ID + " signs"
	}
	return text
}

// slot is where exactly one authority signs: one root in all, one JWT key for
// each replica.
type slot struct {
	kind    Kind
	replica string
}

func (a *Authority) slot() slot {
	if a.Kind == Root {
		return slot{kind: Root}
	}
	return slot{a.Kind, a.Replica}
}

// Bounds of a set, which is one record, and of the trust bundle.
const (
	// maxUpcoming is how many in one place may be prepared or published.
	maxUpcoming = 4
	// maxRevoked is how many that are revoked stay on the list.
	maxRevoked = 64
	// maxAuthorities is how many there may be in all.
	maxAuthorities = 256
)

// Room says why no further authority of a kind can be prepared for replica, as a
// *RefusedError.
func (s Set) Room(kind Kind, replica string) error {
	place := (&Authority{Kind: kind, Replica: replica}).slot()
	upcoming := 0
	for i := range s.all {
		if a := &s.all[i]; a.slot() == place && (a.State == Prepared || a.State == Published) {
			upcoming++
		}
	}
	c := Command{Verb: Prepare, ID: string(kind)}
	switch {
	case upcoming >= maxUpcoming:
		return refused(c, "%d are prepared or published already, and sign nothing: activate one of them, or revoke those that nobody wants", upcoming)
	case len(s.all) >= maxAuthorities:
		return refused(c, "there are %d authorities already: revoke those that are old or tainted; what is revoked leaves the list by itself", len(s.all))
	}
	return nil
}

// Successor returns the root that is to sign because the one that does has ended
// at now: of those published the one that lives longest; nil if there is none.
func (s Set) Successor(now time.Time) (next *Authority) {
	if root := s.Root(); root == nil || !root.Ended(now) {
		return nil
	}
	for i := range s.all {
		if a := &s.all[i]; a.Kind == Root && a.State == Published && !a.Ended(now) && (next == nil || a.NotAfter.After(next.NotAfter)) {
			next = a
		}
	}
	return next
}

// TaintedIDs are those of the tainted authorities, in order.
func (s Set) TaintedIDs() []string {
	var ids []string
	for _, a := range s.all {
		if a.State == Tainted {
			ids = append(ids, a.ID)
		}
	}
	slices.Sort(ids)
	return ids
}

// clone returns a set that can be changed.
func (s Set) clone() Set {
	all := slices.Clone(s.all)
	for i := range all {
		all[i].Since = maps.Clone(all[i].Since)
	}
	return Set{all}
}

// Stamped returns the set with sequence as that of every step that waits for
// the trust bundle which is about to be written.
func (s Set) Stamped(sequence uint64) Set {
	next := s.clone()
	for i := range next.all {
		if a := &next.all[i]; a.State.Trusted() && a.Sequence == 0 {
			a.Sequence = sequence
		}
	}
	return next
}

// Resealed returns the set with another root's seal over a root that is to come:
// of the one that signs now, which replicas have that joined since.
func (s Set) Resealed(id string, seal []byte, by string) Set {
	a, ok := s.Get(id)
	if !ok || a.SealedBy == by || a.State != Prepared && a.State != Published {
		return s
	}
	next := s.clone()
	a, _ = next.Get(id)
	a.Seal, a.SealedBy = seal, by
	return next
}

// Equal says whether two sets say the same.
func (s Set) Equal(other Set) bool {
	a, errA := s.Encode()
	b, errB := other.Encode()
	return errA == nil && errB == nil && string(a) == string(b)
}

const encodingVersion = 1

type stored struct {
	Version     int         `json:"v"`
	Authorities []Authority `json:"authorities"`
}

// Encode returns the set as it is stored.
func (s Set) Encode() ([]byte, error) {
	b, err := json.Marshal(stored{encodingVersion, s.all})
	if err != nil {
		return nil, fmt.Errorf("encode the authorities: %w", err)
	}
	return b, nil
}

// Decode reads a stored set. It takes none in which something is out of order:
// to overlook an authority would be to trust, or to sign with, the wrong one.
func Decode(b []byte) (Set, error) {
	var st stored
	if err := json.Unmarshal(b, &st); err != nil {
		return Set{}, fmt.Errorf("decode the authorities: %w", err)
	}
	if st.Version != encodingVersion {
		return Set{}, fmt.Errorf("decode the authorities: version %d is not known", st.Version)
	}
	s := Set{st.Authorities}
	if err := s.check(); err != nil {
		return Set{}, fmt.Errorf("decode the authorities: %w", err)
	}
	return s, nil
}

// check says what is out of order: an authority that is incomplete or there
// twice, or two that sign in one place.
func (s Set) check() error {
	ids := make(map[string]bool)
	signs := make(map[slot]string)
	for i := range s.all {
		a := &s.all[i]
		if err := a.check(); err != nil {
			return fmt.Errorf("authority %.80q: %w", a.ID, err)
		}
		if ids[a.ID] {
			return fmt.Errorf("authority %s is there twice", a.ID)
		}
		ids[a.ID] = true
		if a.State != Active {
			continue
		}
		if other, taken := signs[a.slot()]; taken {
			return fmt.Errorf("both %s and %s are the active %s", other, a.ID, a.Kind)
		}
		signs[a.slot()] = a.ID
	}
	return nil
}

func (a *Authority) check() error {
	switch {
	case a.ID == "" || a.Replica == "":
		return errors.New("it has no ID or no replica")
	case a.Kind == Root && len(a.Certificate) == 0, a.Kind == JWT && len(a.PublicKey) == 0:
		return errors.New("its public part is missing")
	case a.Kind != Root && a.Kind != JWT:
		return fmt.Errorf("kind %.80q is not known", a.Kind)
	case !a.NotBefore.Before(a.NotAfter):
		return errors.New("its life has no length")
	}
	switch a.State {
	case Prepared, Published, Active, Old, Tainted, Revoked:
		return nil
	}
	return fmt.Errorf("state %.80q is not known", a.State)
}

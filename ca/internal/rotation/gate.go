// What a step waits for: agents that have not acknowledged, those who never
// acknowledge and poll by the refresh hint, and SVIDs that are still alive.

package rotation

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// hints is how many refresh hints pass for those who never acknowledge
// (SPIFFE Trust Domain and Bundle §4.1 advises three to five).
const hints = 3

// settle is how long after its acknowledgement an agent is still waited for: what
// is written to a stream has to be read, and handshakes that began before it to
// end.
const settle = 2 * time.Second

// drained is the same for what a tainted authority has signed: connections that hang
// on it run out before it is withdrawn (sdk/taint.go), and the last agent whose services
// have other SVIDs has only just acknowledged.
const drained = settle + 4*time.Second

// View is what the steps are judged by, beside the authorities.
type View struct {
	Agents  []Agent
	Issuers []Issuer
	// Silent are the replicas that are not heard of, or have not caught up since:
	// they may have renewed agents that do not seem to count. In order.
	Silent []string
}

// Agent is one agent as it counts for rotation.
type Agent struct {
	Name string
	// Sequence is that of the trust bundle that it has acknowledged last: written
	// to all its open streams, and nothing under a tainted authority is served.
	Sequence uint64
	// Since is when it did.
	Since time.Time
	// Until is when the last SVID issued through it has expired.
	Until time.Time
	// Banned: everything issued through it is revoked.
	Banned bool
}

// settled says whether the agent has acknowledged sequence, and that for a time.
func (a Agent) settled(sequence uint64, settle time.Duration, now time.Time) bool {
	just := now.Sub(a.Since)
	return a.Sequence >= sequence && (just < 0 || just >= settle) // a clock that is ahead holds up nobody
}

func (a Agent) counts(now time.Time) bool { return !a.Banned && now.Before(a.Until) }

// Issuer is an intermediate of a replica.
type Issuer struct {
	Replica  string
	ID       string
	Root     string // ID of its root
	NotAfter time.Time
	Current  bool // the replica signs with it
}

// Policy is what the configuration says about rotation.
type Policy struct {
	// RefreshHint is how often those who poll the trust bundle do.
	RefreshHint time.Duration
	// MaxJWTTTL is the longest life of a JWT-SVID.
	MaxJWTTTL time.Duration
	// Keep is how long a revoked authority stays on the list.
	Keep time.Duration
	// LastCall is how long before the end of a root its successor signs, whoever
	// has not acknowledged it; at most an eighth of the root's life.
	LastCall time.Duration
}

// lastCall is when the successor of root waits for nobody any more. What is
// signed under root ends with it, so otherwise everybody loses; and since SVIDs
// are renewed at half of their life, each is once more in what is left.
func (p Policy) lastCall(root *Authority) time.Time {
	return root.NotAfter.Add(-min(p.LastCall, root.NotAfter.Sub(root.NotBefore)/8))
}

// Wait is what a step waits for; the zero value is nothing.
type Wait struct {
	// Agents count, and have not acknowledged; Replicas issue under the authority
	// still; Silent are not heard of. Each in order.
	Agents, Replicas, Silent []string
	// Until is when those who poll have polled, or the last SVID has expired.
	Until time.Time
	// Latest is when it ends, whoever is waited for; zero: it has no such end.
	Latest time.Time
}

// Over says whether the wait has ended at now.
func (w Wait) Over(now time.Time) bool {
	if !w.Latest.IsZero() && !now.Before(w.Latest) {
		return true
	}
	return !w.asks() && !now.Before(w.Until)
}

// asks says whether somebody has yet to do something.
func (w Wait) asks() bool { return len(w.Agents) > 0 || len(w.Replicas) > 0 || len(w.Silent) > 0 }

// maxNamed bounds how many are named in one sentence.
const maxNamed = 5

// String says what is waited for.
func (w Wait) String() string {
	var parts []string
	if len(w.Agents) > 0 {
		parts = append(parts, fmt.Sprintf("%d agents have not acknowledged: %s", len(w.Agents), named(w.Agents)))
	}
	if len(w.Replicas) > 0 {
		parts = append(parts, "these replicas sign under it: "+named(w.Replicas))
	}
	if len(w.Silent) > 0 {
		parts = append(parts, "not heard of, so that their agents are not known: replica "+named(w.Silent))
	}
	if !w.Until.IsZero() {
		parts = append(parts, "not before "+w.Until.UTC().Format(time.RFC3339))
	}
	if !w.Latest.IsZero() && w.asks() {
		parts = append(parts, "without them at "+w.Latest.UTC().Format(time.RFC3339))
	}
	return strings.Join(parts, "; ")
}

func named(names []string) string {
	if len(names) <= maxNamed {
		return strings.Join(names, ", ")
	}
	return strings.Join(names[:maxNamed], ", ") + ", …"
}

// MinLife is the shortest life of a root or JWT key: by half of it the next one
// is published, and must sign before the end. That takes three hints, and the
// two more are for agents, the clock and a slow store.
func (p Policy) MinLife() time.Duration { return 2 * (hints + 2) * p.RefreshHint }

// activation is what stands between a and signing. The root that signs sets it an
// end: from its last call on nobody is waited for but those who poll, and they
// for half of what is left at most. A JWT key has no end of its own, and signs on.
func (s Set) activation(a *Authority, v View, p Policy, now time.Time) Wait {
	w := Wait{Agents: v.missing(a.Sequence, settle, now), Silent: v.Silent, Until: a.Since[Published].Add(hints * p.RefreshHint)}
	root := s.Root()
	if a.Kind != Root || root == nil {
		return w
	}
	last := p.lastCall(root)
	switch half := last.Add(root.NotAfter.Sub(last) / 2); {
	case w.Until.After(half):
		w.Latest = half
	case w.Until.After(last):
		w.Latest = w.Until
	default:
		w.Latest = last
	}
	return w
}

// LeftBehind is whom the activation of an authority does not wait for any more
// at now, because the root that signs is about to end; zero where there is
// nobody.
func LeftBehind(s Set, id string, v View, p Policy, now time.Time) Wait {
	a, ok := s.Get(id)
	if !ok || a.Kind != Root || a.State != Published {
		return Wait{}
	}
	if w := s.activation(a, v, p, now); w.asks() && w.Over(now) {
		return w
	}
	return Wait{}
}

// revocation is what stands between a and the end: whoever has an SVID under it
// must have another by then.
func (s Set) revocation(a *Authority, v View, p Policy, now time.Time) Wait {
	end := v.lastUse(a, p)
	switch a.State {
	case Old:
		return Wait{Replicas: v.signing(a), Until: end}
	case Tainted:
		if signing := v.signing(a); len(signing) > 0 || now.Before(end) {
			return Wait{Agents: v.missing(a.Sequence, drained, now), Replicas: signing, Silent: v.Silent, Until: a.Since[Tainted].Add(hints * p.RefreshHint)}
		}
	}
	return Wait{} // it has signed nothing, or nothing that lives
}

// Served returns the sequence that every agent serves which counts, current at the
// most, and the names of those that do not serve that one yet. What an agent served
// before its acknowledgement is not known: one that has just come counts for nothing.
func (v View) Served(current uint64, now time.Time) (sequence uint64, behind []string) {
	sequence = current
	for _, a := range v.Agents {
		switch {
		case !a.counts(now):
		case a.settled(a.Sequence, settle, now):
			sequence = min(sequence, a.Sequence)
		default:
			sequence = 0
		}
	}
	return sequence, v.missing(current, settle, now)
}

// missing are the agents that count and have not acknowledged sequence, settle ago.
func (v View) missing(sequence uint64, settle time.Duration, now time.Time) (names []string) {
	for _, a := range v.Agents {
		if a.counts(now) && !a.settled(sequence, settle, now) {
			names = append(names, a.Name)
		}
	}
	slices.Sort(names)
	return names
}

// signing are the replicas whose current intermediate is under a.
func (v View) signing(a *Authority) (names []string) {
	for _, i := range v.Issuers {
		if a.Kind == Root && i.Current && i.Root == a.ID {
			names = append(names, i.Replica)
		}
	}
	slices.Sort(names)
	return names
}

// lastUse is when the last SVID under a has expired at the latest: none
// outlives its intermediate.
func (v View) lastUse(a *Authority, p Policy) time.Time {
	end := a.Since[Old]
	if a.Kind == JWT {
		return end.Add(p.MaxJWTTTL)
	}
	for _, i := range v.Issuers {
		if i.Root == a.ID && i.NotAfter.After(end) {
			end = i.NotAfter
		}
	}
	return end
}

// Evidence of every kind but tokens: what it proves, how it is refused, and how
// a proved node becomes a live agent. Who checks evidence parses nothing but
// bytes whose signature holds, within limits that are checked first.

package attest

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/store"
)

// Node is what evidence proved of a machine.
type Node struct {
	// ID is that of the agent on it.
	ID spiffeid.ID
	// Kind is that of the evidence: "x509pop".
	Kind string
	// Selectors are facts about it.
	Selectors []entry.Selector

	// Of evidence that is good once: what it is remembered by, and until when.
	tokenID  string
	tokenEnd time.Time
}

// Attestors are the kinds of evidence that a CA is configured for, beside join
// tokens; nil: that kind is refused.
type Attestors struct {
	POP      *POP
	Clusters map[string]*Cluster // by name
	GCP      *GCP
	Azure    *Azure
	AWS      *AWS
}

// Reason says in a word why evidence is refused, for metrics.
type Reason string

// Reasons. Those of tokens are errors of their own.
const (
	NotConfigured Reason = "not_configured" // this CA takes no evidence of that kind
	Malformed     Reason = "malformed"
	Untrusted     Reason = "untrusted"   // nobody who is trusted vouches for it
	NotProved     Reason = "not_proved"  // it is good, but whose it is was not shown
	NotAllowed    Reason = "not_allowed" // it is good, and not of a node that may come
	Unavailable   Reason = "unavailable" // what it is checked with cannot be had now
)

// RefusedError says why evidence does not prove a node. It is for who sent it.
type RefusedError struct {
	Kind   string // of evidence
	Reason Reason
	Detail string // what is wrong, and what to do about it
}

// Error implements error.
func (e *RefusedError) Error() string { return "attest by " + e.Kind + ": " + e.Detail }

func refused(kind string, reason Reason, format string, args ...any) *RefusedError {
	return &RefusedError{Kind: kind, Reason: reason, Detail: fmt.Sprintf(format, args...)}
}

// NotTaken refuses a kind of evidence that the CA is not configured for; hint is
// what would have to be set.
func NotTaken(kind, hint string) *RefusedError {
	return refused(kind, NotConfigured, "this CA takes no such evidence: %s", hint)
}

// Enroll makes the agent on a proved node live, or live again. notAfter is the
// end of the SVID that it will get. It returns the agent with the revision of
// its record.
func Enroll(ctx context.Context, st store.Store, n *Node, now, notAfter time.Time) (*Agent, error) {
	for range maxAttempts {
		cmps, ops, err := n.use(ctx, st)
		if err != nil {
			return nil, err
		}
		a := &Agent{ID: n.ID, Attestation: n.Kind, Selectors: n.Selectors, AttestedAt: now, NotAfter: notAfter, once: n.tokenID != ""}
		done, err := commit(ctx, st, a, cmps, ops)
		if err != nil {
			return nil, err
		}
		if done {
			return a, nil
		}
	}
	return nil, fmt.Errorf("enroll %s: others keep changing its record", n.ID)
}

const maxNodeSelectors = 64

// facts collects selectors of one type. What could not be one is left out: it is
// a fact less, never another.
type facts struct {
	kind string
	list []entry.Selector
}

func (f *facts) add(key, value string) {
	sel := entry.Selector{Type: f.kind, Value: key + ":" + value}
	if entry.CheckNodeSelector(sel) == nil && len(f.list) < maxNodeSelectors && !slices.Contains(f.list, sel) {
		f.list = append(f.list, sel)
	}
}

// Adoption by steps: what a service lets through, until a date, that its policy
// denies. What is decided stays what it is; only what is done about it changes, and
// each time is logged and counted.

package sdk

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"merlon.dev/policy"
)

const (
	// maxAudit is how far ahead the end of audit mode may lie. A step that is
	// planned for longer is none.
	maxAudit = 366 * 24 * time.Hour
	// maxPlaintextCallers is how many addresses are told apart.
	maxPlaintextCallers = 1000
)

// reasons give each reason of a denial its place in a table.
var reasons = policy.Reasons()

// audit is what an Identity lets through in spite of the decision. The zero value
// lets nothing through.
type audit struct {
	until     time.Time // zero: never
	plaintext time.Time // zero: never; not after until

	denied [16]atomic.Uint64 // by place in reasons
	log    limitedLog

	mu      sync.Mutex
	callers map[string]*PlaintextCaller // guarded by mu; by address
}

// set takes the dates of the options in. It refuses those that say nothing, or that
// nobody would live to see.
func (a *audit) set(o *options, now time.Time) error {
	a.log.level = slog.LevelWarn
	if end := o.AuditUntil; end != nil {
		if end.IsZero() || end.After(now.Add(maxAudit)) {
			return fmt.Errorf("audit mode until %s: it needs an end, at most a year ahead", end.Format(time.RFC3339))
		}
		a.until = *end
	}
	if end := o.PlaintextUntil; end != nil {
		if end.IsZero() || end.After(a.until) {
			return fmt.Errorf("plaintext until %s: its callers have no identity and are let through in audit mode only, and so it needs an end that is not after audit mode's", end.Format(time.RFC3339))
		}
		a.plaintext = *end
	}
	return nil
}

// lets says whether a denial for r is let through at now: what a policy says, or
// cannot say, of a caller that has proved who it is. Revoked and expired callers
// and ambiguous requests are none of that.
func (a *audit) lets(r policy.Reason, now time.Time) bool {
	return r.Auditable() && now.Before(a.until)
}

// letsPlaintext says whether callers without TLS are let through at now.
func (a *audit) letsPlaintext(now time.Time) bool { return now.Before(a.plaintext) }

// Audited says whether a call was let through by audit mode alone: the policy denied
// it, for d.Reason.
func Audited(d policy.Decision) bool { return d.Allow && d.Reason != policy.Allowed }

// enforce turns a decision into what happens: the decision itself, but for a denial
// that audit mode lets through.
func (id *Identity) enforce(ctx context.Context, in *policy.Input, d policy.Decision) policy.Decision {
	if d.Allow {
		return d
	}
	if id.audit.lets(d.Reason, time.Now()) {
		return id.letThrough(ctx, in, d)
	}
	id.logDenied(ctx, in, d, nil)
	return d
}

// letThrough lets a denied call through, for the record. What the policy wants sent
// with a denial is not for a call that is served.
func (id *Identity) letThrough(ctx context.Context, in *policy.Input, d policy.Decision) policy.Decision {
	if i := slices.Index(reasons, d.Reason); i >= 0 {
		id.audit.denied[i].Add(1)
	}
	id.audit.log.log(ctx, id.log, "audit mode: a call was let through that would be denied",
		slog.String("reason", string(d.Reason)),
		slog.String("decision_id", d.DecisionID.String()),
		slog.String("source", in.Source),
		slog.String("remote", in.SourceAddress),
		slog.String("protocol", string(in.Protocol)),
		slog.String("method", in.Method),
		slog.String("path", in.Path),
		slog.Time("until", id.audit.until))
	d.Allow, d.Response = true, nil
	return d
}

// startAudit says aloud what is let through, and that it is over when it is.
func (id *Identity) startAudit(ctx context.Context) {
	a := &id.audit
	if a.until.IsZero() {
		return
	}
	left := time.Until(a.until)
	if left <= 0 {
		id.log.LogAttrs(ctx, slog.LevelWarn, "audit mode is over and the policy is enforced: take sdk.WithAuditUntil out", slog.Time("until", a.until))
		return
	}
	attrs := []slog.Attr{slog.Time("until", a.until)}
	if a.letsPlaintext(time.Now()) {
		attrs = append(attrs, slog.Time("plaintext_until", a.plaintext))
	}
	id.log.LogAttrs(ctx, slog.LevelWarn, "AUDIT MODE: calls that the policy denies are let through", attrs...)
	id.goroutines.Go(func() {
		if sleep(ctx, left) {
			id.log.LogAttrs(ctx, slog.LevelWarn, "audit mode is over: the policy is enforced", slog.Time("until", a.until))
			id.calls.changed()
		}
	})
}

// PlaintextCaller is a machine that calls without TLS.
type PlaintextCaller struct {
	Address string // without the port
	Calls   uint64 // that were let through
	Refused uint64 // connections and calls after the date
	Last    time.Time
}

// otherCallers stands for the addresses beyond maxPlaintextCallers.
const otherCallers = "others"

// sawPlaintext counts a call or a connection without TLS.
func (a *audit) sawPlaintext(remote string, let bool, now time.Time) {
	if host, _, err := net.SplitHostPort(remote); err == nil {
		remote = host
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.callers[remote]
	if c == nil && len(a.callers) >= maxPlaintextCallers {
		remote = otherCallers
		c = a.callers[remote]
	}
	if c == nil {
		c = &PlaintextCaller{Address: remote}
		if a.callers == nil {
			a.callers = make(map[string]*PlaintextCaller)
		}
		a.callers[remote] = c
	}
	c.Last = now
	if let {
		c.Calls++
	} else {
		c.Refused++
	}
}

// Stats are counters since Open, for a program's own metrics.
type Stats struct {
	// WouldDeny counts the calls that audit mode alone has let through, by the
	// reason of the policy's denial; NO_IDENTITY are the plaintext ones.
	WouldDeny map[policy.Reason]uint64
	// Plaintext are those who call without TLS where WithPlaintextUntil is given,
	// also after its date, by address; at most 1000 and "others".
	Plaintext []PlaintextCaller
}

// Stats tells how far a gradual adoption has come.
func (id *Identity) Stats() Stats {
	a := &id.audit
	s := Stats{WouldDeny: make(map[policy.Reason]uint64)}
	for i, r := range reasons {
		if n := a.denied[i].Load(); n > 0 {
			s.WouldDeny[r] = n
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for c := range maps.Values(a.callers) {
		s.Plaintext = append(s.Plaintext, *c)
	}
	slices.SortFunc(s.Plaintext, func(a, b PlaintextCaller) int { return strings.Compare(a.Address, b.Address) })
	return s
}

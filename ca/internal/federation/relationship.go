// How a relationship with another trust domain goes, in both directions, judged by what
// is kept of it: what was once fetched is not well for ever.

package federation

import (
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/trust"
)

const (
	// lateAfter is how many intervals may pass without a fetch.
	lateAfter = 3
	// lateSlack is what a fetch takes, and until it is written down.
	lateSlack = 30 * time.Second
)

// Relationship is what there is about one other trust domain; each part may be missing.
type Relationship struct {
	Bundle *trust.Federated
	Source *Source
	Invite *Invite
	// Shared are the keys that it has in common with further trust domains.
	Shared []trust.SharedKey
	// Unreadable is why a record of it counts for nothing: of a later Merlon, or
	// damaged.
	Unreadable error
}

// Health is how it goes.
type Health struct {
	// Theirs says how their trust bundle comes here: ok, failing, late, ended, empty,
	// missing, by hand or none.
	Theirs string
	// Ours says whether our trust bundle is fetched there: ok, late, never, expired or
	// not invited.
	Ours string
	// Problems are what somebody has to look at.
	Problems []string
}

// Health judges r with td at now. hint is what our trust bundle says of how often to
// come back.
func (r Relationship) Health(td spiffeid.TrustDomain, hint time.Duration, now time.Time) (h Health) {
	var theirs, ours string
	h.Theirs, theirs = r.theirs(now)
	h.Ours, ours = r.ours(hint, now)
	problems := []string{theirs, ours}
	if h.Theirs == "failing" { // which says nothing of what is known
		_, known := r.known(now)
		problems = []string{theirs, known, ours}
	}
	for _, problem := range problems {
		if problem != "" {
			h.Problems = append(h.Problems, problem)
		}
	}
	for _, k := range r.Shared {
		h.Problems = append(h.Problems, fmt.Sprintf("%s is in the trust bundle of %s too: whoever holds it vouches for both; one of the two has copied it, or both have one key", k.What, strings.Join(k.With(td), ", ")))
	}
	return h
}

func (r Relationship) theirs(now time.Time) (state, problem string) {
	s, b := r.Source, r.Bundle
	known, worse := r.known(now)
	switch {
	case r.Unreadable != nil:
		return "failing", "what was kept of it cannot be read: " + r.Unreadable.Error()
	case s != nil && s.Failure != "":
		return "failing", fmt.Sprintf("their trust bundle cannot be had since %s: %s", s.FailingSince.Format(time.RFC3339), s.Failure)
	case known != "":
		return known, worse
	case b == nil && s != nil:
		return "missing", "their trust bundle has not been had yet"
	case b == nil:
		return "none", ""
	case s == nil:
		return "by hand", ""
	case late(s.FetchedAt, s.SetAt, s.Interval(), now):
		return "late", fmt.Sprintf("their trust bundle was fetched at %s last, and should be every %s: does a replica lead, and can it write?", moment(s.FetchedAt), s.Interval())
	}
	return "ok", ""
}

// known is what is wrong with the trust bundle itself, however it came.
func (r Relationship) known(now time.Time) (state, problem string) {
	switch b := r.Bundle; {
	case b == nil:
		return "", ""
	case b.Empty():
		return "empty", "nobody of theirs is trusted: their trust bundle holds no key that can be used"
	case !b.End().IsZero() && !now.Before(b.End()):
		return "ended", "their last X.509 authority ended at " + b.End().Format(time.RFC3339)
	}
	return "", ""
}

func (r Relationship) ours(hint time.Duration, now time.Time) (state, problem string) {
	i, interval := r.Invite, max(hint, PollLeast)
	switch {
	case i == nil:
		return "not invited", ""
	case i.FetchedAt.IsZero() && now.Sub(i.InvitedAt) > InviteTTL:
		return "expired", fmt.Sprintf("ours was never fetched there, and the token of %s can be accepted no longer: make another one, or remove the federation", i.InvitedAt.Format(time.RFC3339))
	case i.FetchedAt.IsZero():
		return "never", ""
	case late(i.FetchedAt, i.InvitedAt, interval, now):
		return "late", fmt.Sprintf("ours was fetched there at %s last, and should be every %s: ask the other side's operator", moment(i.FetchedAt), interval)
	}
	return "ok", ""
}

// late says whether more than lateAfter intervals have passed since the last fetch, or
// since the first was to be.
func late(fetched, since time.Time, interval time.Duration, now time.Time) bool {
	if fetched.Before(since) {
		fetched = since
	}
	return now.Sub(fetched) > lateAfter*interval+lateSlack
}

func moment(t time.Time) string {
	if t.IsZero() {
		return "no time"
	}
	return t.Format(time.RFC3339)
}

// How a relationship goes is judged by when something last came, in both directions.

package federation

import (
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid/forge"
)

func TestHealth(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	bundleOf := func(text string) *trust.Federated {
		b, err := trust.NewFederated(spiffeid.RequireTrustDomainFromString("shop.test"), partner, []byte(text), now)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ca := forge.New(t, partner.Name())
	text, err := ca.Bundle().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	good, empty := bundleOf(string(text)), bundleOf(`{"keys":null}`)
	source := func(set, fetched time.Time, hint time.Duration) *Source {
		return &Source{SetAt: set, Outcome: Outcome{TriedAt: fetched, FetchedAt: fetched, RefreshHint: hint}}
	}
	failing := source(ago(time.Hour), ago(time.Minute), 0)
	failing.Outcome = failing.After(nil, failure(TooLarge, "too much"), now)
	invite := func(invited, fetched time.Time) *Invite { return &Invite{InvitedAt: invited, FetchedAt: fetched} }
	const hint = time.Minute
	never := time.Time{}
	shared := []trust.SharedKey{{What: "the JWT key", TrustDomains: []spiffeid.TrustDomain{partner, spiffeid.RequireTrustDomainFromString("other.test")}}}
	for name, tt := range map[string]struct {
		Relationship
		theirs, ours, problem string
	}{
		"nothing":               {Relationship{}, "none", "not invited", ""},
		"by hand":               {Relationship{Bundle: good}, "by hand", "not invited", ""},
		"just fetched":          {Relationship{Bundle: good, Source: source(ago(time.Hour), now, hint)}, "ok", "not invited", ""},
		"three hints ago":       {Relationship{Bundle: good, Source: source(ago(time.Hour), ago(3*hint+lateSlack), hint)}, "ok", "not invited", ""},
		"longer ago":            {Relationship{Bundle: good, Source: source(ago(time.Hour), ago(3*hint+lateSlack+time.Second), hint)}, "late", "not invited", "every 1m0s"},
		"no hint, 10 minutes":   {Relationship{Bundle: good, Source: source(ago(time.Hour), ago(10*time.Minute), 0)}, "ok", "not invited", ""},
		"no hint, 16 minutes":   {Relationship{Bundle: good, Source: source(ago(time.Hour), ago(16*time.Minute), 0)}, "late", "not invited", "every 5m0s"},
		"never, and just set":   {Relationship{Bundle: good, Source: source(ago(time.Minute), never, 0)}, "ok", "not invited", ""},
		"never, set long ago":   {Relationship{Bundle: good, Source: source(ago(time.Hour), never, 0)}, "late", "not invited", "no time"},
		"in the future":         {Relationship{Bundle: good, Source: source(ago(time.Hour), now.Add(time.Hour), hint)}, "ok", "not invited", ""},
		"failing":               {Relationship{Bundle: good, Source: failing}, "failing", "not invited", "too much"},
		"had nothing yet":       {Relationship{Source: source(now, never, 0)}, "missing", "not invited", "not been had"},
		"emptied":               {Relationship{Bundle: empty, Source: source(ago(time.Hour), now, hint)}, "empty", "not invited", "nobody of theirs"},
		"emptied, and failing":  {Relationship{Bundle: empty, Source: failing}, "failing", "not invited", "too much;nobody of theirs"},
		"emptied, unreadable":   {Relationship{Bundle: empty, Unreadable: failure(Refused, "v 9")}, "failing", "not invited", "v 9;nobody of theirs"},
		"unreadable":            {Relationship{Bundle: good, Unreadable: failure(Refused, "v 9")}, "failing", "not invited", "v 9"},
		"a key of two":          {Relationship{Bundle: good, Shared: shared}, "by hand", "not invited", "other.test"},
		"invited":               {Relationship{Invite: invite(ago(time.Hour), never)}, "none", "never", ""},
		"invited too long ago":  {Relationship{Invite: invite(ago(InviteTTL+time.Hour), never)}, "none", "expired", "make another"},
		"they come":             {Relationship{Invite: invite(ago(time.Hour), ago(hint))}, "none", "ok", ""},
		"they come no more":     {Relationship{Invite: invite(ago(time.Hour), ago(3*hint+lateSlack+time.Second))}, "none", "late", "other side"},
		"invited anew meantime": {Relationship{Invite: invite(ago(hint), ago(time.Hour))}, "none", "ok", ""},
	} {
		h := tt.Health(partner, hint, now)
		if h.Theirs != tt.theirs || h.Ours != tt.ours || (len(h.Problems) > 0) != (tt.problem != "") || !strings.Contains(strings.Join(h.Problems, ";"), tt.problem) {
			t.Errorf("%s: %+v; want %s, %s, and a problem with %q", name, h, tt.theirs, tt.ours, tt.problem)
		}
	}
	later := Relationship{Bundle: good, Source: source(now, now, hint)}.Health(partner, hint, ca.Cert.NotAfter)
	if later.Theirs != "ended" || len(later.Problems) != 1 {
		t.Errorf("when the last root has ended: %+v", later)
	}
	later = Relationship{Bundle: good, Source: failing}.Health(partner, hint, ca.Cert.NotAfter)
	if later.Theirs != "failing" || len(later.Problems) != 2 || !strings.Contains(later.Problems[1], "ended") {
		t.Errorf("when the last root has ended, and the fetch fails: %+v", later)
	}
}

// The next try is a hint away from the last one, whoever made that.
func TestDue(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		Outcome
		interval, due time.Duration
	}{
		"not tried":              {Outcome{}, PollDefault, 0},
		"just tried (B10)":       {Outcome{TriedAt: now}, PollDefault, PollDefault},
		"a hint":                 {Outcome{TriedAt: now.Add(-20 * time.Second), RefreshHint: time.Minute}, time.Minute, 40 * time.Second},
		"a hint of a second":     {Outcome{TriedAt: now, RefreshHint: time.Second}, PollLeast, PollLeast},
		"a hint of a day":        {Outcome{TriedAt: now, RefreshHint: 24 * time.Hour}, PollMost, PollMost},
		"overdue":                {Outcome{TriedAt: now.Add(-time.Hour)}, PollDefault, 0},
		"tried in the future":    {Outcome{TriedAt: now.Add(time.Hour)}, PollDefault, 0},
		"as often, failed (F-3)": {Outcome{RefreshHint: time.Minute}.After(nil, failure(BadStatus, "500"), now), time.Minute, time.Minute},
	} {
		if interval, due := tt.Interval(), tt.Due(now); interval != tt.interval || due.Round(time.Second) != tt.due {
			t.Errorf("%s: every %v, in %v; want %v, %v", name, interval, due, tt.interval, tt.due)
		}
	}
}

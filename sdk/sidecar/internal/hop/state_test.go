// What is known of an upstream, and who gets requests by it.

package hop_test

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/sdk/sidecar/internal/hop"
)

var errSick = errors.New("not well")

func TestChecksChangeAnUpstreamByTheirThresholds(t *testing.T) {
	for name, tc := range map[string]struct {
		checks string // + passes, - fails
		want   hop.State
	}{
		"none yet":                          {"", hop.Healthy},
		"the first fails":                   {"-", hop.Unhealthy},
		"one fails later":                   {"+-", hop.Healthy},
		"as many as needed":                 {"+---", hop.Unhealthy},
		"not in a row":                      {"+--+--", hop.Healthy},
		"unhealthy and one passes":          {"-+", hop.Unhealthy},
		"unhealthy and enough pass":         {"-++", hop.Healthy},
		"unhealthy and not enough in a row": {"-+-+", hop.Unhealthy},
		"back and forth":                    {"-++---", hop.Unhealthy},
	} {
		u := new(hop.Upstream)
		var changes int
		was := hop.Healthy
		for _, c := range tc.checks {
			err := errSick
			if c == '+' {
				err = nil
			}
			changed := u.Check(err, hop.Thresholds{Healthy: 2, Unhealthy: 3})
			now := u.State(time.Now())
			if changed != (now != was) {
				t.Errorf("%s: changed is %t, from %s to %s", name, changed, was, now)
			}
			if was = now; changed {
				changes++
			}
		}
		if was != tc.want {
			t.Errorf("%s: after %q %s; want %s", name, tc.checks, was, tc.want)
		}
	}
}

// Whatever came before, enough checks in a row say what an upstream is, and one
// against them does not unless one is enough.
func TestEnoughChecksInARowDecide(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limits := hop.Thresholds{Healthy: rapid.IntRange(1, 5).Draw(t, "healthy"), Unhealthy: rapid.IntRange(1, 5).Draw(t, "unhealthy")}
		u := new(hop.Upstream)
		outcome := func(pass bool) error {
			if pass {
				return nil
			}
			return errSick
		}
		for _, pass := range rapid.SliceOf(rapid.Bool()).Draw(t, "before") {
			u.Check(outcome(pass), limits)
		}
		last := rapid.Bool().Draw(t, "last")
		for range max(limits.Healthy, limits.Unhealthy) {
			u.Check(outcome(last), limits)
		}
		if got := u.State(time.Now()) == hop.Healthy; got != last {
			t.Fatalf("healthy is %t after checks that say %t", got, last)
		}
		u.Check(outcome(!last), limits)
		needed := limits.Unhealthy
		if !last {
			needed = limits.Healthy
		}
		if got := u.State(time.Now()) == hop.Healthy; got != last && needed > 1 {
			t.Fatalf("one check of %d has changed it", needed)
		}
	})
}

// Those that are well come first, then those that rest, and where all are unhealthy
// requests are tried all the same.
func TestPickPrefersTheHealthy(t *testing.T) {
	once := hop.Thresholds{Healthy: 1, Unhealthy: 1}
	well, rests, sick := &hop.Upstream{Address: "well"}, &hop.Upstream{Address: "rests"}, &hop.Upstream{Address: "sick"}
	all := hop.NewUpstreams(sick, rests, well)
	sick.Check(errSick, once)
	mustPick(t, hop.NewUpstreams(rests)).Done(true)
	for name, tc := range map[string]struct {
		tried []*hop.Upstream
		want  string
	}{
		"of all":                {nil, "well"},
		"without the healthy":   {[]*hop.Upstream{well}, "rests"},
		"of the unhealthy only": {[]*hop.Upstream{well, rests}, "sick"},
	} {
		for range 50 {
			u, err := all.Pick(tc.tried...)
			if err != nil || u.Address != tc.want {
				t.Fatalf("%s: %v, %v; want %s", name, u, err, tc.want)
			}
			u.Done(u == rests) // it goes on to rest
		}
	}
	if _, err := all.Pick(well, rests, sick); err == nil {
		t.Error("one that was tried already is picked")
	}
	if all.AllUnhealthy() || !hop.NewUpstreams(sick).AllUnhealthy() {
		t.Error("AllUnhealthy does not say what is")
	}
}

func mustPick(t *testing.T, s *hop.Upstreams) *hop.Upstream {
	t.Helper()
	u, err := s.Pick()
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// An upstream whose checks pass again gets requests at once, though requests had
// failed before.
func TestRecoveryEndsARest(t *testing.T) {
	once := hop.Thresholds{Healthy: 1, Unhealthy: 1}
	u := new(hop.Upstream)
	mustPick(t, hop.NewUpstreams(u)).Done(true)
	if got := u.State(time.Now()); got != hop.Resting {
		t.Fatalf("after a failed request: %s", got)
	}
	u.Check(errSick, once)
	u.Check(nil, once)
	if got := u.State(time.Now()); got != hop.Healthy {
		t.Errorf("after checks that pass again: %s", got)
	}
}

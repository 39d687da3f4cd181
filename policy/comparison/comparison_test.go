// What is counted, and that it stays bounded.

package comparison

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"merlon.dev/policy"
)

func TestNote(t *testing.T) {
	allow := policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "g"}
	deny := policy.Decision{Reason: policy.MethodNotGranted}
	in := &policy.Input{Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders"}
	for name, test := range map[string]struct {
		active, candidate policy.Decision
		want              Counts
		differs           bool
	}{
		"both allow": {allow, allow, Counts{BothAllow: 1}, false},
		"both deny":  {deny, deny, Counts{BothDeny: 1}, false},
		"would deny": {allow, deny, Counts{WouldDeny: 1}, true},
		"would allow": {
			policy.Decision{Reason: policy.NoGrant},
			allow,
			Counts{WouldAllow: 1},
			true,
		},
	} {
		var tally Tally
		if differ := tally.Note(in, true, test.active, test.candidate); differ != test.differs {
			t.Errorf("%s: differ = %v", name, differ)
		}
		want := Report{Sites: map[Site]Counts{{in.Destination, true}: test.want}, Differences: map[Difference]uint64{}}
		if test.differs {
			want.Differences[Difference{
				Source: in.Source, Destination: in.Destination, Reason: test.active.Reason, RuleID: test.active.RuleID,
				CandidateReason: test.candidate.Reason, CandidateRuleID: test.candidate.RuleID, CandidateAllows: test.candidate.Allow,
			}] = 1
		}
		if diff := cmp.Diff(want, tally.Take()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if r := tally.Take(); !r.Empty() {
			t.Errorf("%s: taken twice: %+v", name, r)
		}
	}
}

// Whatever arrives, memory is bounded and no call with a difference is lost from the
// sum.
func TestBounded(t *testing.T) {
	var tally Tally
	const calls = MaxSites + MaxDifferences + 10
	for i := range calls {
		in := &policy.Input{Source: "spiffe://shop.test/web", Destination: fmt.Sprintf("spiffe://shop.test/%d", i)}
		tally.Note(in, false, policy.Decision{Allow: true}, policy.Decision{})
	}
	r := tally.Take()
	sum := r.Dropped
	for _, n := range r.Differences {
		sum += n
	}
	if len(r.Sites) != MaxSites || len(r.Differences) != MaxDifferences || sum != calls {
		t.Errorf("%d destinations, %d differences, %d calls; want %d, %d, %d", len(r.Sites), len(r.Differences), sum, MaxSites, MaxDifferences, calls)
	}
}

// Counts do not depend on how they were cut into reports.
func TestReportsAddUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var whole, parts Tally
		var sum Report
		for i := range rapid.IntRange(0, 40).Draw(t, "calls") {
			in := &policy.Input{Source: "s", Destination: rapid.SampledFrom([]string{"a", "b"}).Draw(t, "destination")}
			canary := rapid.Bool().Draw(t, "canary")
			active := policy.Decision{Allow: rapid.Bool().Draw(t, "active")}
			candidate := policy.Decision{Allow: rapid.Bool().Draw(t, "candidate")}
			whole.Note(in, canary, active, candidate)
			parts.Note(in, canary, active, candidate)
			if i%3 == 0 {
				sum.Add(parts.Take())
			}
		}
		sum.Add(parts.Take())
		var want Report
		want.Add(whole.Take())
		if diff := cmp.Diff(want, sum); diff != "" {
			t.Errorf("(-whole +parts):\n%s", diff)
		}
	})
}

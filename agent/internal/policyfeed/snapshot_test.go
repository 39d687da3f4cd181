// Who decides which call, by one snapshot.

package policyfeed

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/ca/capb"
	"merlon.dev/policy/engine"
)

const node, service = "spiffe://shop.test/agent/n1", "spiffe://shop.test/orders"

func TestFor(t *testing.T) {
	active, candidate := new(engine.Engine), new(engine.Engine)
	canary := func(stage capb.PolicyStage, c *capb.PolicyCanary) rollout {
		return rolloutOf(&capb.PolicyCandidate{Stage: stage, Canary: c})
	}
	named := &capb.PolicyCanary{Destinations: []string{"spiffe://shop.test/web", service}}
	const isCanary = capb.PolicyStage_POLICY_STAGE_CANARY
	for name, test := range map[string]struct {
		s    Snapshot
		want Choice
	}{
		"nothing":                 {Snapshot{}, Choice{}},
		"no candidate":            {Snapshot{Active: active}, Choice{Decides: active}},
		"a candidate alone":       {Snapshot{Candidate: candidate, rollout: canary(isCanary, named)}, Choice{}},
		"a rollout without one":   {Snapshot{Active: active, rollout: canary(isCanary, named)}, Choice{Decides: active}},
		"in shadow":               {Snapshot{Active: active, Candidate: candidate, rollout: canary(capb.PolicyStage_POLICY_STAGE_SHADOW, named)}, Choice{Decides: active, Beside: candidate}},
		"in no stage":             {Snapshot{Active: active, Candidate: candidate, rollout: canary(0, named)}, Choice{Decides: active, Beside: candidate}},
		"in a stage of later":     {Snapshot{Active: active, Candidate: candidate, rollout: canary(99, named)}, Choice{Decides: active, Beside: candidate}},
		"named":                   {Snapshot{Active: active, Candidate: candidate, rollout: canary(isCanary, named)}, Choice{Decides: candidate, Beside: active, Canary: true}},
		"another is named":        {Snapshot{Active: active, Candidate: candidate, rollout: canary(isCanary, &capb.PolicyCanary{Destinations: []string{service + "/v2"}})}, Choice{Decides: active, Beside: candidate}},
		"in the share of all":     {Snapshot{Active: active, Candidate: candidate, rollout: canary(isCanary, &capb.PolicyCanary{PerMille: 1000})}, Choice{Decides: candidate, Beside: active, Canary: true}},
		"in the share of nobody":  {Snapshot{Active: active, Candidate: candidate, rollout: canary(isCanary, &capb.PolicyCanary{})}, Choice{Decides: active, Beside: candidate}},
		"a canary without a word": {Snapshot{Active: active, Candidate: candidate, rollout: canary(isCanary, nil)}, Choice{Decides: active, Beside: candidate}},
	} {
		if got := test.s.For(node, service); got != test.want {
			t.Errorf("%s: %+v; want %+v", name, got, test.want)
		}
	}
}

// The same call gets the same answer while a share stands, and one that is in it stays
// in while it grows.
func TestSharesGrow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		agent, destination := rapid.String().Draw(t, "agent"), rapid.String().Draw(t, "destination")
		less := rapid.Uint32Range(0, 1000).Draw(t, "less")
		more := rapid.Uint32Range(less, 1000).Draw(t, "more")
		small, large := rollout{PerMille: less}, rollout{PerMille: more}
		if small.covers(agent, destination) && !large.covers(agent, destination) {
			t.Errorf("in %d per mille and not in %d", less, more)
		}
		if less == 0 && small.covers(agent, destination) || more == 1000 && !large.covers(agent, destination) {
			t.Error("none or all is something else")
		}
	})
}

func TestShareIsAboutWhatItSays(t *testing.T) {
	r, in := rollout{PerMille: 100}, 0
	for i := range 20_000 {
		if r.covers(fmt.Sprintf("spiffe://shop.test/agent/n%d", i%100), fmt.Sprintf("spiffe://shop.test/s%d", i/100)) {
			in++
		}
	}
	if in < 1800 || in > 2200 {
		t.Errorf("%d of 20000 pairs are in 100 per mille", in)
	}
}

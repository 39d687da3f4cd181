// When a canary is past the limits, what replicas know of each other, and who lags.

package rollout

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/store"
	"merlon.dev/policy/comparison"
)

func TestJudge(t *testing.T) {
	limits := Limits{MaxRise: 0.01, MinCalls: 100}
	a, b := comparison.Site{Destination: "spiffe://shop.test/a", Canary: true}, comparison.Site{Destination: "spiffe://shop.test/b", Canary: true}
	shadow := comparison.Site{Destination: "spiffe://shop.test/a"}
	type sites = map[comparison.Site]comparison.Counts
	for name, test := range map[string]struct {
		sites       sites
		want        bool
		destination string
	}{
		"nothing":                            {nil, false, ""},
		"at the limit":                       {sites{a: {BothAllow: 99, WouldDeny: 1}}, false, ""},
		"past it":                            {sites{a: {BothAllow: 98, WouldDeny: 2}}, true, a.Destination},
		"too few calls":                      {sites{a: {WouldDeny: 99}}, false, ""},
		"calls that both deny":               {sites{a: {BothDeny: 1000, WouldDeny: 50}}, false, ""},
		"calls that it allows":               {sites{a: {WouldAllow: 1000, WouldDeny: 50}}, false, ""},
		"in shadow":                          {sites{shadow: {WouldDeny: 1000}}, false, ""},
		"of one that others would hide":      {sites{a: {WouldDeny: 100}, b: {BothAllow: 1_000_000}}, true, a.Destination},
		"of all, and of none alone":          {sites{a: {BothAllow: 50, WouldDeny: 5}, b: {BothAllow: 50, WouldDeny: 5}}, true, ""},
		"the worst one":                      {sites{a: {BothAllow: 90, WouldDeny: 10}, b: {BothAllow: 50, WouldDeny: 50}}, true, b.Destination},
		"of all, too few":                    {sites{a: {WouldDeny: 50}, b: {BothDeny: 60}}, false, ""},
		"shadow counts do not fill it up":    {sites{a: {WouldDeny: 50}, shadow: {BothAllow: 60}}, false, ""},
		"allowing more does not outweigh it": {sites{a: {BothAllow: 90, WouldDeny: 10, WouldAllow: 5000}}, true, a.Destination},
	} {
		alarm, past := limits.Judge(comparison.Report{Sites: test.sites}, time.Now())
		if past != test.want || alarm.Destination != test.destination {
			t.Errorf("%s: %+v, %v; want %v at %q", name, alarm, past, test.want, test.destination)
		}
	}
}

// More denials never end an alarm.
func TestJudgeIsMonotone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limits := Limits{MaxRise: rapid.Float64Range(0.001, 0.5).Draw(t, "rise"), MinCalls: rapid.Uint64Range(1, 50).Draw(t, "min")}
		site := comparison.Site{Destination: "d", Canary: true}
		c := comparison.Counts{BothAllow: rapid.Uint64Range(0, 200).Draw(t, "allow"), WouldDeny: rapid.Uint64Range(0, 200).Draw(t, "deny")}
		_, before := limits.Judge(comparison.Report{Sites: map[comparison.Site]comparison.Counts{site: c}}, time.Now())
		c.WouldDeny += rapid.Uint64Range(0, 50).Draw(t, "more")
		if _, after := limits.Judge(comparison.Report{Sites: map[comparison.Site]comparison.Counts{site: c}}, time.Now()); before && !after {
			t.Errorf("no alarm any more with %+v", c)
		}
	})
}

func report(n uint64) comparison.Report {
	return comparison.Report{
		Sites:       map[comparison.Site]comparison.Counts{{Destination: "d", Canary: true}: {WouldDeny: n}},
		Differences: map[comparison.Difference]uint64{{Source: "s", Destination: "d", RuleID: "r"}: n},
		Dropped:     n,
	}
}

func TestCountsAreOfOneStep(t *testing.T) {
	b := NewBoard()
	now := Trial{7, 2}
	b.Count("main", now, now, nil, report(3))
	b.Count("main", now, Trial{7, 1}, nil, report(100)) // of the step before
	b.Count("main", now, Trial{6, 2}, nil, report(100))
	b.Count("main", Trial{}, Trial{}, nil, report(100)) // there is no candidate
	b.Count("other", now, now, nil, report(100))
	if diff := cmp.Diff(report(3), b.Counts("main", now, nil, nil)); diff != "" {
		t.Error(diff)
	}
	if r := b.Counts("main", Trial{7, 3}, nil, nil); !r.Empty() {
		t.Errorf("the next step begins with %+v", r)
	}
}

// A CA that starts again goes on from what it wrote down, and adds what others did.
func TestCountsOutliveTheProcess(t *testing.T) {
	trial := Trial{7, 2}
	stored := func(replica string, n uint64, of Trial) *Share {
		put, err := NewShare("main", replica, 5, of, report(n), nil).Put()
		if err != nil {
			t.Fatal(err)
		}
		s, err := DecodeShare(store.KV{Key: put.Key, Value: put.Value})
		if err != nil || s.Bundle != "main" || s.Replica != replica {
			t.Fatalf("%+v, %v", s, err)
		}
		return s
	}
	b := NewBoard()
	own := stored("a", 10, trial)
	b.Count("main", trial, trial, own, report(1))
	b.Count("main", trial, trial, own, report(1)) // what was written down counts once
	others := []*Share{stored("b", 100, trial), stored("c", 1000, Trial{7, 1})}
	if diff := cmp.Diff(report(112), b.Counts("main", trial, own, others)); diff != "" {
		t.Error(diff)
	}
}

func TestShareIsBounded(t *testing.T) {
	var r comparison.Report
	r.Add(comparison.Report{})
	for i := range comparison.MaxDifferences {
		d := fmt.Sprintf("spiffe://shop.test/ns/a-rather-long-name/service-%d", i)
		r.Sites[comparison.Site{Destination: d}] = comparison.Counts{WouldDeny: 1}
		r.Differences[comparison.Difference{Source: d, Destination: d}] = uint64(i)
	}
	points := make([]Point, 3000)
	for i := range points {
		points[i] = Point{AgentID: fmt.Sprintf("spiffe://shop.test/agent/node-%04d", i), Active: 5, Processes: make([]Process, 40)}
	}
	points[2999].Active = 4
	s := NewShare("main", "a", 5, Trial{7, 1}, r, points)
	put, err := s.Put()
	if err != nil || len(put.Value) > 1<<20 {
		t.Fatalf("%d bytes, %v", len(put.Value), err)
	}
	if s.Points[0].AgentID != points[2999].AgentID || s.Unnamed != 2500 || s.Points[0].Unnamed != 24 {
		t.Errorf("first %+v, %d unnamed; want who lags first", s.Points[0], s.Unnamed)
	}
	if len(points[0].Processes) != 40 {
		t.Error("the caller's points were changed")
	}
	if s.Differ[0].Calls != comparison.MaxDifferences-1 {
		t.Errorf("the first difference has %d calls; want the most", s.Differ[0].Calls)
	}
}

func TestSince(t *testing.T) {
	at := func(hour int) time.Time { return time.Date(2026, 11, 26, hour, 0, 0, 0, time.UTC) }
	h := &release.Head{Release: release.Release{Generation: 9, IssuedAt: at(9)}, History: []release.Release{
		{Generation: 7, IssuedAt: at(7)}, {Generation: 6, IssuedAt: at(6)},
	}}
	for generation, want := range map[uint64]time.Time{10: {}, 9: {}, 8: at(9), 7: at(9), 6: at(7), 5: at(6), 0: at(6)} {
		if got := Since(h, generation); !got.Equal(want) {
			t.Errorf("Since(%d) = %v; want %v", generation, got, want)
		}
	}
}

func FuzzDecodeShare(f *testing.F) {
	put, err := NewShare("main", "a", 5, Trial{7, 1}, report(3), []Point{{AgentID: "spiffe://shop.test/agent/n", Processes: []Process{{PID: 3}}}}).Put()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(put.Value)
	f.Add([]byte(`{"v":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := DecodeShare(store.KV{Key: SharePrefix + "main/a", Value: raw})
		if err != nil {
			return
		}
		if s.Version != encodingVersion {
			t.Errorf("version %d was read", s.Version)
		}
		NewBoard().Counts("main", s.Trial, s, []*Share{s})
	})
}

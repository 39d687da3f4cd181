// Stock OPAs, which say of themselves what they like.

package rollout

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"merlon.dev/ca/internal/store"
	"merlon.dev/policy/comparison"
)

func TestOPAsOfAllReplicas(t *testing.T) {
	at := time.Date(2026, 11, 26, 8, 30, 0, 0, time.UTC)
	opa := func(instance string, active uint64, after time.Duration) OPA {
		return OPA{Uploader: "token:main:1", Instance: instance, Active: active, HeardAt: at.Add(after)}
	}
	faulty := opa("faulty", 3, time.Minute)
	faulty.Fault = "bundle_error: no signature"
	own := []OPA{opa("current", 3, time.Minute), opa("moved", 2, time.Minute), faulty}
	others := []*Share{
		{OPAs: []OPA{opa("moved", 3, 2*time.Minute), opa("silent", 1, -time.Nanosecond), opa("elsewhere", 2, 0)}},
		{OPAs: []OPA{opa("current", 1, 0)}}, // where it was before
	}
	var got []string
	for _, o := range MergeOPAs(3, own, others, at) {
		got = append(got, fmt.Sprint(o.Instance, " ", o.Active))
	}
	if want := []string{"elsewhere 2", "faulty 3", "current 3", "moved 3"}; !cmp.Equal(got, want) {
		t.Errorf("%q; want %q: laggards first", got, want)
	}
}

func TestShareOfOPAs(t *testing.T) {
	heard := time.Date(2026, 11, 26, 8, 30, 59, 1, time.UTC)
	opas := make([]OPA, maxSharedOPAs+10)
	for i := range opas {
		opas[i] = OPA{Uploader: "token:main:1", Instance: fmt.Sprint(i), Labels: map[string]string{"region": "east"}, Active: 3, Fault: "f", HeardAt: heard}
	}
	s := NewShare("main", "ca", 3, Trial{}, comparison.Report{}, nil)
	s.Hear(opas)
	put, err := s.Put()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeShare(store.KV{Key: put.Key, Value: put.Value})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.OPAs) != maxSharedOPAs || !got.OPAs[0].HeardAt.Equal(heard.Truncate(time.Minute)) || got.OPAs[7].Instance != "7" || got.OPAs[7].Labels["region"] != "east" {
		t.Errorf("%d OPAs, the first %+v", len(got.OPAs), got.OPAs[0])
	}
	if !opas[0].HeardAt.Equal(heard) {
		t.Error("what was given was changed")
	}
}

func TestLabelsAreBounded(t *testing.T) {
	all := map[string]string{"id": "i", "b": strings.Repeat("x", maxLabelBytes), "a": "1.22.2"}
	for i := range 100 {
		all[fmt.Sprintf("d%02d", i)] = "0123456789"
	}
	got, size := LabelsOf(all), 0
	for name, value := range got {
		size += len(name) + len(value)
	}
	if size > maxLabelBytes || len(got) < 10 || got["id"] != "" || got["b"] != "" || got["a"] != "1.22.2" {
		t.Errorf("%d bytes: %v", size, got)
	}
}

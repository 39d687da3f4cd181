// Header fields as policies see them, and go on seeing them.

package httpauth

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
)

func TestPolicySeesFieldsInLowerCase(t *testing.T) {
	names := []string{"X-Role", "x-role", "X-ROLE", "X_role", "X-Rol\u212a", "Accept", "", "É", "x-É", "X-\xff"}
	rapid.Check(t, func(t *rapid.T) {
		header := http.Header(rapid.MapOf(rapid.SampledFrom(names), rapid.SliceOfN(rapid.SampledFrom([]string{"", "1", "a,b", "é", "\xff"}), 0, 3)).Draw(t, "header"))
		want := map[string][]string{}
		for name, values := range header {
			lower := strings.ToLower(name)
			want[lower] = slices.Sorted(slices.Values(append(want[lower], values...)))
		}
		in, isUTF8 := &policy.Input{Headers: sent(header)}, policy.HeaderMap(header).UTF8()
		// What the handler does to its request changes nothing.
		for name, values := range header {
			for i := range values {
				values[i] = "changed"
			}
			header[name] = append(values, "more")
		}
		header.Set("X-New", "1")

		sorted := func(a, b []string) bool { return slices.Equal(slices.Sorted(slices.Values(a)), b) } // names that differ in case come in no order
		if got := in.HeaderMap(); !maps.EqualFunc(got, want, sorted) {
			t.Fatalf("all: %q; want %q", got, want)
		}
		if in.Headers.UTF8() != isUTF8 {
			t.Fatalf("UTF-8: %v", in.Headers.UTF8())
		}
		for _, name := range append(names, "x-role", "x_role", "x-rolk", "é", "x-é", "x-new", "accept", "accep", "accept-") {
			values, present := want[name]
			if got, ok := in.Header(name); ok != present || !sorted(got, values) {
				t.Fatalf("%s: %q, %v; want %q, %v", name, got, ok, values, present)
			}
		}
	})
}

// An unread header costs one copy of its values, and no new names.
func TestFieldsAreCopiedOnce(t *testing.T) {
	header := http.Header{"Accept": {"*/*"}, "User-Agent": {"x"}, "X-A": {"1", "2"}, "X-Request-Id": {"1"}}
	if n := testing.AllocsPerRun(100, func() { sent(header) }); n > 3 {
		t.Errorf("%v allocations", n)
	}
}

// What the record of a denied request costs, with its copy of the fields: of the ten
// fields that a browser or a proxy adds.
func BenchmarkRecordDenied(b *testing.B) {
	header := http.Header{}
	for i := range 10 {
		header.Set(fmt.Sprintf("X-Header-%d", i), "some value of a header")
	}
	in := &policy.Input{
		Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: policy.HTTP, Method: "GET", Path: "/orders/1", Headers: sent(header),
	}
	denied := policy.Decision{Reason: policy.NoGrant}
	r, now := decisionlog.NewRecorder(decisionlog.Options{Records: 512}), time.Now()
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		r.Record(in, &denied, now)
		if n%256 == 0 {
			r.Take(512, func(*decisionlog.Record) {})
		}
	}
	if r.Dropped() > 0 {
		b.Error("records were dropped, which costs less")
	}
}

// How many further tries there are, of one request and of all.

package hop_test

import (
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// Whatever requests do, no more of them are further tries at the same time than the
// budget allows, and no request has more tries than it may.
func TestTriesStayWithinBudgetAndAttempts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u := new(hop.Upstream)
		h := &hop.Hop{Upstreams: hop.NewUpstreams(u), Retry: hop.Retry{Attempts: rapid.IntRange(1, 4).Draw(t, "attempts")}}
		h.Upstreams.Budget = hop.Budget{Percent: rapid.IntRange(1, 100).Draw(t, "percent"), Floor: rapid.IntRange(1, 5).Draw(t, "floor")}
		live := rapid.IntRange(0, 40).Draw(t, "live")
		for range live {
			if _, err := h.Upstreams.Pick(); err != nil {
				t.Fatal(err)
			}
		}
		limit := max(live*h.Upstreams.Budget.Percent/100, h.Upstreams.Budget.Floor)
		requests := make([]hop.Tries, 12)
		held := make([]int, len(requests))
		under, made, denied := 0, 0, 0
		for _, i := range rapid.SliceOfN(rapid.IntRange(0, 2*len(requests)-1), 0, 200).Draw(t, "again, or settle") {
			if i >= len(requests) {
				i -= len(requests)
				h.Settle(&requests[i])
				under -= held[i]
				held[i] = 0
				continue
			}
			want := int(requests[i].More())+1 < h.Retry.Attempts
			if want && under >= limit {
				want = false
				denied++
			}
			if got := h.Again(&requests[i]); got != want {
				t.Fatalf("Again is %t; with %d of %d under way, and %d further of at most %d", got, under, limit, requests[i].More(), h.Retry.Attempts-1)
			}
			if want {
				under++
				held[i]++
				made++
			}
		}
		if m, d := h.Upstreams.Retries(); int(m) != made || int(d) != denied {
			t.Fatalf("%d made and %d denied are counted; %d and %d were", m, d, made, denied)
		}
	})
}

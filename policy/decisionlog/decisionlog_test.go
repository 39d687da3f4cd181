// What is counted and kept: everything is counted, whatever happens beside it; below
// the size of the ring nothing is lost, and above it what is lost is counted.

package decisionlog

import (
	"fmt"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"merlon.dev/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var instant = time.Date(2026, 11, 26, 4, 0, 0, 123456789, time.UTC)

type key struct{ source, destination, rule, reason string }

// Whoever counts at the same time, and whoever takes counts out meanwhile: the sum
// of each row is right, and where there are too many rows the sum of each reason.
func TestCountsAreExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 40).Draw(t, "limit")
		kinds := rapid.SliceOfNDistinct(rapid.Custom(func(t *rapid.T) key {
			return key{
				rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, "source"), rapid.SampledFrom([]string{"", "a", "x"}).Draw(t, "destination"),
				rapid.SampledFrom([]string{"", "g1", "g2"}).Draw(t, "rule"), rapid.SampledFrom([]string{"ALLOWED", "NO_GRANT", "NEW_ONE"}).Draw(t, "reason"),
			}
		}), 1, 30, func(k key) key { return k }).Draw(t, "kinds")
		const workers, each = 4, 200
		r := NewRecorder(Options{Rows: limit, Records: 64})
		var taken sync.WaitGroup
		stop, since := make(chan struct{}), map[key]uint64{}
		take := func() {
			counts, done := r.TakeCounts(1 << 20)
			done()
			for _, c := range counts {
				since[key{c.Source, c.Destination, c.RuleID, string(c.Reason)}] += c.N
			}
			r.TakeCounts(1 << 20) // which nobody says to have taken
		}
		taken.Go(func() {
			for {
				select {
				case <-stop:
					take()
					return
				default:
					take()
				}
			}
		})
		var counting sync.WaitGroup
		for w := range workers {
			counting.Go(func() {
				for i := range each {
					k := kinds[(w*7+i)%len(kinds)]
					d := policy.Decision{Allow: k.reason == "ALLOWED", Reason: policy.Reason(k.reason), RuleID: k.rule}
					r.Record(&policy.Input{Source: k.source, Destination: k.destination}, &d, instant)
				}
			})
		}
		counting.Wait()
		close(stop)
		taken.Wait()

		want, wantByReason := map[key]uint64{}, map[string]uint64{}
		for w := range workers {
			for i := range each {
				k := kinds[(w*7+i)%len(kinds)]
				want[k]++
				wantByReason[k.reason]++
			}
		}
		got, gotByReason, own := map[key]uint64{}, map[string]uint64{}, 0
		for _, c := range r.Rows() {
			k := key{c.Source, c.Destination, c.RuleID, string(c.Reason)}
			got[k] = c.N
			if k.source != Other {
				own++
				if c.N != want[k] && len(kinds) <= limit {
					t.Fatalf("%+v: %d; want %d", k, c.N, want[k])
				}
			}
			if k.reason == "UNKNOWN" {
				k.reason = "NEW_ONE"
			}
			gotByReason[k.reason] += c.N
		}
		if own > limit+workers || len(kinds) <= limit && !reflect.DeepEqual(got, want) {
			t.Fatalf("%d rows of at most %d: %v; want %v", own, limit, got, want)
		}
		if !reflect.DeepEqual(gotByReason, wantByReason) || !reflect.DeepEqual(since, got) {
			t.Fatalf("by reason %v; want %v; taken out %v of %v", gotByReason, wantByReason, since, got)
		}
	})
}

// A service that makes callers up leaves room for the rows of the others.
func TestEachDestinationHasItsShareOfRows(t *testing.T) {
	r := NewRecorder(Options{Rows: 100, RowsPerDestination: 10})
	for n := range 1000 {
		r.Count(fmt.Sprint("made-up-", n), "hostile", "", policy.NoGrant, 1)
	}
	r.Count("web", "orders", "reads", policy.Allowed, 7)
	own, other := 0, uint64(0)
	for _, c := range r.Rows() {
		switch c.Destination {
		case "hostile":
			own++
		case Other:
			other = c.N
		case "orders":
			if c.N != 7 {
				t.Errorf("orders has %d", c.N)
			}
		}
	}
	if own != 10 || other != 990 || len(r.Rows()) != 12 {
		t.Errorf("%d rows, %d counted as other; want 10 and 990", own, other)
	}
}

func deny(n int) (*policy.Input, *policy.Decision) {
	return &policy.Input{Source: "spiffe://a.test/web", Destination: "spiffe://a.test/orders", Protocol: policy.HTTP, Method: "POST", Path: fmt.Sprint("/", n)},
		&policy.Decision{Reason: policy.MethodNotGranted, Revision: 7, DecisionID: policy.NewDecisionID()}
}

func TestNothingIsLostBelowTheSizeAndDropsAreCountedAbove(t *testing.T) {
	r := NewRecorder(Options{Records: 64})
	for round := range 3 {
		for n := range 100 {
			in, d := deny(n)
			r.Record(in, d, instant)
		}
		next := 0
		n := r.Take(1000, func(rec *Record) {
			if want := fmt.Sprint("/", next); rec.Input().Path != want {
				t.Errorf("record %d is about %s", next, rec.Input().Path)
			}
			next++
		})
		if n != 64 || r.Dropped() != uint64(36*(round+1)) {
			t.Errorf("round %d: %d records, %d dropped in all; want 64 and %d", round, n, r.Dropped(), 36*(round+1))
		}
	}
	if n := r.Take(1000, func(*Record) {}); n != 0 {
		t.Errorf("%d records come twice", n)
	}
}

// With many who write and one who reads each decision is taken once, whole, or
// counted as dropped.
func TestRingUnderLoad(t *testing.T) {
	const workers, each = 8, 3000
	r := NewRecorder(Options{Records: 128})
	var writing sync.WaitGroup
	for w := range workers {
		writing.Go(func() {
			for i := range each {
				in, d := deny(w*each + i)
				in.Host = strings.Repeat(string(rune('a'+w)), 1+i%90)
				r.Record(in, d, instant)
			}
		})
	}
	var over atomic.Bool
	go func() { writing.Wait(); over.Store(true) }()
	seen, last := map[string]bool{}, [workers]int{}
	for {
		end := over.Load()
		n := r.Take(50, func(rec *Record) {
			in := rec.Input()
			var of int
			fmt.Sscanf(in.Path, "/%d", &of)
			w, i := of/each, of%each
			if seen[in.Path] || in.Host != strings.Repeat(string(rune('a'+w)), 1+i%90) || i < last[w] {
				t.Errorf("record %s of %q: twice, out of order or mixed", in.Path, in.Host)
			}
			seen[in.Path], last[w] = true, i
		})
		if end && n == 0 {
			break
		}
	}
	if uint64(len(seen))+r.Dropped() != workers*each {
		t.Errorf("%d taken and %d dropped of %d", len(seen), r.Dropped(), workers*each)
	}
}

// All denials and dry-run differences are kept; of the other allowed calls some
// are, and each says how many it stands for, so that none is missing from the sum.
func TestSampledAllowsStandForAll(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := NewRecorder(Options{Records: 64, AllowsPerSecond: 10})
		rate := rapid.SampledFrom([]int{1, 5, 100, 20_000}).Draw(t, "calls a second")
		pause := time.Second / time.Duration(rate)
		n := rapid.IntRange(1, 3000).Draw(t, "calls")
		kept, sum := 0, uint64(0)
		for i := range n {
			d := policy.Decision{Allow: true, Reason: policy.Allowed}
			r.Record(&policy.Input{Source: "s"}, &d, instant.Add(time.Duration(i)*pause))
			r.Take(1, func(rec *Record) { kept++; sum += rec.StandsFor() })
		}
		if sum+r.sampler.since.Load() != uint64(n) || r.Dropped() != 0 {
			t.Fatalf("%d kept stand for %d; with %d after them it should be %d", kept, sum, r.sampler.since.Load(), n)
		}
		// At first it has to find the rate: it doubles.
		if most := 20 + 20*(1+int(time.Duration(n)*pause/time.Second)); kept > most {
			t.Fatalf("%d kept of %d at %d a second; want at most %d", kept, n, rate, most)
		}
		if rate <= 5 && kept < n {
			t.Fatalf("%d kept of %d at %d a second, which is less than there may be", kept, n, rate)
		}
	})
}

func TestASampleThatFindsNoRoomIsStoodForByTheNext(t *testing.T) {
	r := NewRecorder(Options{Records: 2})
	d := policy.Decision{Allow: true, Reason: policy.Allowed}
	at := instant
	record := func() { at = at.Add(time.Second); r.Record(&policy.Input{}, &d, at) }
	for range 5 { // each is chosen; the ring has room for two
		record()
	}
	r.Take(10, func(*Record) {})
	record()
	r.Take(10, func(rec *Record) {
		if rec.StandsFor() != 4 {
			t.Errorf("it stands for %d; want itself and three", rec.StandsFor())
		}
	})
	if r.Dropped() != 0 {
		t.Errorf("%d dropped; an allowed call that was only a sample is none", r.Dropped())
	}
}

// After a quiet time the rate that was found in a busy one does not hide calls.
func TestSamplerFollowsTheLoad(t *testing.T) {
	var s sampler
	s.pause = int64(100 * time.Millisecond)
	at := int64(0)
	for range 500_000 { // a million a second
		at += 1000
		s.take(at)
	}
	if every := s.every.Load(); every < 50_000 || every > 200_000 {
		t.Errorf("at a million calls a second it takes every %d-th", every)
	}
	chosen := 0
	for range 30 {
		at += int64(time.Second)
		if s.take(at) > 0 {
			chosen++
		}
	}
	if chosen < 29 {
		t.Errorf("%d of 30 calls, one a second, are kept", chosen)
	}
}

func TestWhatIsAlwaysKept(t *testing.T) {
	for name, tt := range map[string]struct {
		o    Options
		d    policy.Decision
		want int
	}{
		"denials":                         {Options{}, policy.Decision{Reason: policy.NoGrant}, 50},
		"dry-run grants that would deny":  {Options{}, policy.Decision{Allow: true, Reason: policy.Allowed, DryRun: []string{"d"}}, 50},
		"dry-run grants that would allow": {Options{}, policy.Decision{Reason: policy.NoGrant, DryRun: []string{"d"}}, 50},
		"allowed calls, where none are":   {Options{AllowsPerSecond: -1}, policy.Decision{Allow: true, Reason: policy.Allowed}, 0},
		"anything, where it only counts":  {Options{Records: -1}, policy.Decision{Reason: policy.NoGrant}, 0},
	} {
		r := NewRecorder(tt.o)
		for range 50 {
			r.Record(&policy.Input{}, &tt.d, instant)
		}
		if n := r.Take(1000, func(*Record) {}); n != tt.want || r.Rows()[0].N != 50 {
			t.Errorf("%s: %d of 50 kept; want %d", name, n, tt.want)
		}
	}
}

// What fits comes back as it was; what does not is named, and what is there of it
// is its beginning.
func TestRecordsHoldACall(t *testing.T) {
	text := func(n int) *rapid.Generator[string] { return rapid.StringN(0, n, 4*n) }
	rapid.Check(t, func(t *rapid.T) {
		long := rapid.IntRange(1, 700).Draw(t, "long")
		in := &policy.Input{
			Source: text(long).Draw(t, "source"), Destination: text(long).Draw(t, "destination"), Protocol: rapid.SampledFrom([]policy.Protocol{policy.HTTP, policy.GRPC, policy.TCP}).Draw(t, "protocol"),
			Method: text(40).Draw(t, "method"), Path: text(long).Draw(t, "path"), Query: text(long).Draw(t, "query"), Host: text(long).Draw(t, "host"),
			SourceAddress: "10.0.0.1:1", DestinationAddress: "[::1]:2", SourceSerial: "ab12",
			Headers: policy.HeaderMap(rapid.MapOfN(text(20), rapid.SliceOfN(text(60), 1, 3), 0, 5).Draw(t, "headers")),
		}
		d := policy.Decision{
			LetThrough: rapid.Bool().Draw(t, "let through"),
			Reason:     policy.NoGrant, RuleID: text(long).Draw(t, "rule"), Revision: rapid.Uint64().Draw(t, "revision"), DecisionID: policy.NewDecisionID(),
			DryRun: rapid.SliceOfN(rapid.StringMatching(`[a-z]{1,60}`), 0, 4).Draw(t, "dry run"),
		}
		r := NewRecorder(Options{Rows: rapid.SampledFrom([]int{1, 10}).Draw(t, "rows"), Records: 2})
		r.Count("another", "", "", policy.NoGrant, 1) // with one row, the call's own is other
		r.Record(in, &d, instant)
		r.Take(1, func(rec *Record) {
			got, gotD, lost := rec.Input(), rec.Decision(), rec.Incomplete()
			for _, f := range []struct {
				bit       Fields
				got, want string
			}{
				{SourceID, got.Source, in.Source},
				{DestinationID, got.Destination, in.Destination},
				{RuleID, gotD.RuleID, d.RuleID},
				{Method, got.Method, in.Method},
				{Path, got.Path, in.Path},
				{Query, got.Query, in.Query},
				{Host, got.Host, in.Host},
			} {
				cut := lost&f.bit != 0
				if !cut && f.got != f.want || cut && !strings.HasPrefix(f.want, strings.TrimRight(f.got, "\uFFFD")) {
					t.Fatalf("%v: %q of %q, named as incomplete: %v", f.bit.Names(), f.got, f.want, cut)
				}
			}
			if len(in.HeaderMap()) == 0 {
				in.Headers = nil
			}
			if lost&Headers == 0 {
				if diff := cmp.Diff(in.Headers, got.Headers); diff != "" {
					t.Fatal(diff)
				}
			}
			for name, values := range got.HeaderMap() {
				if !reflect.DeepEqual(values, in.HeaderMap()[name]) {
					t.Fatalf("header %q has %q of %q", name, values, in.HeaderMap()[name])
				}
			}
			if lost&DryRun == 0 && strings.Join(gotD.DryRun, " ") != strings.Join(d.DryRun, " ") {
				t.Fatalf("dry run %q of %q", gotD.DryRun, d.DryRun)
			}
			gotD.DryRun, gotD.RuleID, d.DryRun, d.RuleID = nil, "", nil, ""
			if !reflect.DeepEqual(gotD, d) || !rec.At().Equal(instant) || got.Protocol != in.Protocol || got.SourceAddress != in.SourceAddress || got.SourceSerial != in.SourceSerial {
				t.Fatalf("%+v of %+v", gotD, d)
			}
		})
	})
}

func TestNamesOfFields(t *testing.T) {
	all := JWT<<1 - 1
	if got := FieldsNamed(append(all.Names(), "something newer")); got != all || len(all.Names()) != len(names) {
		t.Errorf("%v, by name %v", all.Names(), got)
	}
}

// No secret of a call is in a record, whoever reads it.
var secretHeaders = []string{"authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key"}

func TestSecretHeadersAreNotKept(t *testing.T) {
	in, d := deny(1)
	in.Headers = policy.HeaderMap{"accept": {"x"}}
	for _, name := range secretHeaders {
		in.HeaderMap()[name] = []string{"canary"}
	}
	r := NewRecorder(Options{})
	r.Record(in, d, instant)
	r.Take(1, func(rec *Record) {
		if strings.Contains(string(rec.text[:]), "canary") || rec.Incomplete() != Headers || len(rec.Input().HeaderMap()) != 1+len(secretHeaders) || rec.Input().HeaderMap()["cookie"][0] != "(masked)" {
			t.Errorf("%v, without %v", rec.Input().Headers, rec.Incomplete().Names())
		}
	})
}

func TestRecordingDoesNotAllocate(t *testing.T) {
	r := NewRecorder(Options{Records: 1 << 12})
	all, now := calls(64), time.Now()
	differs := policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "web", DryRun: []string{"dry", "drier"}}
	for _, d := range []*policy.Decision{&allowed, &denied, &differs} {
		for _, in := range all {
			in.Headers = policy.HeaderMap{"accept": {"text/html", "text/plain"}, "x-request-id": {"1"}}
			r.Record(in, d, now)
		}
		i := 0
		if n := testing.AllocsPerRun(1000, func() { r.Record(all[i%len(all)], d, now); i++ }); n != 0 {
			t.Errorf("%s: %v allocations", d.Reason, n)
		}
	}
}

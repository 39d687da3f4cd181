// What is kept, for which calls and until when. That the calls which share a decision
// are those that OPA answers alike is tested in policy/engine.

package kept

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/policy/program"
)

func call(path string) *policy.Input {
	return &policy.Input{Source: "spiffe://a.test/web", Destination: "spiffe://a.test/orders", Protocol: policy.HTTP, Method: "GET", Path: path}
}

func allowed(rule string) program.Verdict {
	return program.Verdict{Reason: policy.Allowed, RuleID: rule}
}

func TestNothingIsKeptBeyondTheEndOfAGrant(t *testing.T) {
	c := New(Reads{}, []int64{200, 100})
	in := call("/")
	if _, ok := c.Find(in, 0); ok {
		t.Fatal("an empty cache has a decision")
	}
	steps := []struct {
		asked, came, at int64
		want            bool
	}{
		{0, 1, 99, true},
		{0, 1, 100, false},     // the grant has ended
		{99, 100, 100, false},  // it ended during the decision
		{100, 101, 199, true},  // until the next one
		{100, 101, 200, false}, //
		{200, 201, 1 << 62, true},
	}
	for _, s := range steps {
		c := New(Reads{}, []int64{200, 100})
		c.Put(in, allowed("r"), s.asked, s.came)
		if v, ok := c.Find(in, s.at); ok != s.want || ok && v.RuleID != "r" {
			t.Errorf("asked at %d, came at %d: at %d there is %+v, %v; want %v", s.asked, s.came, s.at, v, ok, s.want)
		}
	}
}

func TestTheLastDecisionAboutACallIsKept(t *testing.T) {
	c := New(Reads{}, nil)
	for i := range 10 {
		c.Put(call("/"), allowed(fmt.Sprint(i)), 0, 0)
	}
	if v, ok := c.Find(call("/"), 0); !ok || v.RuleID != "9" {
		t.Errorf("%+v, %v", v, ok)
	}
}

func TestCacheIsBounded(t *testing.T) {
	c := New(Reads{}, nil)
	const n = 3 * sets * ways
	for i := range n {
		c.Put(call(fmt.Sprintf("/%d", i)), allowed(fmt.Sprint(i)), 0, 0)
	}
	found := 0
	for i := range n {
		v, ok := c.Find(call(fmt.Sprintf("/%d", i)), 0)
		if ok {
			found++
		}
		if ok && v.RuleID != fmt.Sprint(i) {
			t.Fatalf("/%d has the decision about %s", i, v.RuleID)
		}
	}
	if found > sets*ways || found < sets*ways/2 {
		t.Errorf("%d of %d are kept; want about %d and no more", found, n, sets*ways)
	}
	long := call("/" + strings.Repeat("a", maxKey))
	c.Put(long, allowed("long"), 0, 0)
	if _, ok := c.Find(long, 0); ok {
		t.Error("a call that is too long is kept")
	}
	for n, want := range map[int]bool{maxResponse: true, maxResponse + 1: false} {
		v := allowed("body")
		v.Response = &policy.Response{Body: strings.Repeat("a", n-3), Headers: []policy.HeaderField{{Name: "a", Value: "b"}}, RemoveHeaders: []string{"c"}}
		c.Put(call("/body"), v, 0, 0)
		got, ok := c.Find(call("/body"), 0)
		if c = New(Reads{}, nil); ok != want || ok && got.Response != v.Response {
			t.Errorf("with %d bytes to send: kept is %v", n, ok)
		}
	}
}

// What is asked for again and again outlives what was asked for once.
func TestWhatIsUsedStays(t *testing.T) {
	c := New(Reads{}, nil)
	hot := call("/hot")
	c.Put(hot, allowed("hot"), 0, 0)
	lost := 0
	for i := range 4 * sets * ways {
		c.Put(call(fmt.Sprintf("/%d", i)), allowed("cold"), 0, 0)
		if _, ok := c.Find(hot, 0); !ok {
			lost++
			c.Put(hot, allowed("hot"), 0, 0)
		}
	}
	if lost > 2 {
		t.Errorf("the call in use was lost %d times", lost)
	}
}

// Two calls share a key only if they agree in all that is read.
func TestKeysTellCallsApart(t *testing.T) {
	word := rapid.SampledFrom([]string{"", "a", "b", "ab", "\x01a", "a\x01"})
	rapid.Check(t, func(t *rapid.T) {
		c := New(Reads{
			Query: rapid.Bool().Draw(t, "query"), Host: rapid.Bool().Draw(t, "host"), SourceAddress: rapid.Bool().Draw(t, "from"),
			DestinationAddress: rapid.Bool().Draw(t, "to"), AllHeaders: rapid.Bool().Draw(t, "all"),
			Headers: rapid.SampledFrom([][]string{nil, {"a"}, {"a", "b"}}).Draw(t, "names"),
		}, nil)
		one := func(label string) *policy.Input {
			return &policy.Input{
				Source: word.Draw(t, label+"source"), Destination: word.Draw(t, label+"destination"), Protocol: policy.Protocol(word.Draw(t, label+"protocol")),
				Method: word.Draw(t, label+"method"), Path: word.Draw(t, label+"path"), Query: word.Draw(t, label+"query"), Host: word.Draw(t, label+"host"),
				SourceAddress: word.Draw(t, label+"from"), DestinationAddress: word.Draw(t, label+"to"),
				Headers: policy.HeaderMap(rapid.MapOfN(rapid.SampledFrom([]string{"a", "b"}), rapid.SliceOfN(word, 0, 2), 0, 2).Draw(t, label+"headers")),
			}
		}
		x, y := one("x"), one("y")
		if rapid.Bool().Draw(t, "nearly") {
			z := *x
			z.Headers = y.Headers
			y = &z
		}
		if same := string(c.key(nil, x)) == string(c.key(nil, y)); same != agree(&c.reads, x, y) {
			t.Fatalf("%+v and %+v share a key: %v, reading %+v", x, y, same, c.reads)
		}
	})
}

func agree(r *Reads, x, y *policy.Input) bool {
	names := map[string]bool{}
	for _, n := range r.Headers {
		names[n] = true
	}
	if r.AllHeaders {
		for _, in := range []*policy.Input{x, y} {
			for n := range in.HeaderMap() {
				names[n] = true
			}
		}
	}
	for n := range names {
		v, ok1 := x.Header(n)
		w, ok2 := y.Header(n)
		if ok1 != ok2 || fmt.Sprintf("%q", v) != fmt.Sprintf("%q", w) {
			return false
		}
	}
	return x.Source == y.Source && x.Destination == y.Destination && x.Protocol == y.Protocol && x.Method == y.Method && x.Path == y.Path &&
		(!r.Query || x.Query == y.Query) && (!r.Host || x.Host == y.Host) &&
		(!r.SourceAddress || x.SourceAddress == y.SourceAddress) && (!r.DestinationAddress || x.DestinationAddress == y.DestinationAddress)
}

func TestConcurrentUse(t *testing.T) {
	c := New(Reads{}, nil)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 20_000 {
				path := fmt.Sprintf("/%d", (i*7+g)%64)
				c.Put(call(path), allowed(path), 0, 0)
				if v, ok := c.Find(call(path), 0); ok && v.RuleID != path {
					t.Errorf("%s has the decision about %s", path, v.RuleID)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestFindAllocatesNothing(t *testing.T) {
	c := New(Reads{Query: true, Headers: []string{"a"}}, nil)
	in := call("/orders/1")
	in.Headers = policy.HeaderMap{"a": {"b"}}
	c.Put(in, allowed("r"), 0, 0)
	if n := testing.AllocsPerRun(100, func() {
		if _, ok := c.Find(in, 0); !ok {
			t.Fatal("not kept")
		}
	}); n != 0 {
		t.Errorf("Find allocates %v times", n)
	}
}

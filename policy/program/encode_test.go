// Programs on their way: what is written is read, and nothing else.

package program

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"merlon.dev/policy"
)

var anyText = rapid.SampledFrom([]string{"", "a", "/a", "spiffe://a.test/web", "GET", "x-a", strings.Repeat("é", 70)})

// some draws nil or a short list.
func some[T any](t *rapid.T, of *rapid.Generator[T], label string) []T {
	if rapid.Bool().Draw(t, label+" any") {
		return nil
	}
	return rapid.SliceOfN(of, 0, 3).Draw(t, label)
}

var anyPath = rapid.Custom(func(t *rapid.T) Path {
	return Path{Text: anyText.Draw(t, "text"), More: rapid.Bool().Draw(t, "more"), Parts: some(t, rapid.Custom(func(t *rapid.T) Part {
		return Part{Text: anyText.Draw(t, "part"), Free: rapid.Bool().Draw(t, "free")}
	}), "parts")}
})

var anyGrant = rapid.Custom(func(t *rapid.T) Grant {
	return Grant{
		Kind:     rapid.SampledFrom([]Kind{Deny, Allow, DryRun, DryRunDeny}).Draw(t, "kind"),
		Protocol: rapid.SampledFrom([]policy.Protocol{policy.HTTP, policy.GRPC, policy.TCP}).Draw(t, "protocol"),
		From:     some(t, anyText, "from"), Methods: some(t, anyText, "methods"), Paths: some(t, anyPath, "paths"),
		Expires: rapid.SampledFrom([]int64{0, 1, -1, math.MaxInt64, math.MinInt64}).Draw(t, "expires"),
	}
})

func anyOperand(t *rapid.T, nested, depth int) Operand {
	o := Operand{Field: Field(rapid.IntRange(0, int(fields)-1).Draw(t, "field")), Case: Case(rapid.IntRange(0, int(cases)-1).Draw(t, "case"))}
	switch o.Field {
	case Element:
		if nested == 0 {
			o.Field = SourceID
		} else {
			o.N = rapid.IntRange(0, nested-1).Draw(t, "level")
		}
	case Text, Header:
		o.Text = anyText.Draw(t, "text")
	case ListAt:
		l := anyList(t, nested, depth+1)
		o.N, o.List = rapid.IntRange(0, 3).Draw(t, "n"), &l
	}
	return o
}

func anyList(t *rapid.T, nested, depth int) List {
	l := List{Kind: Lists(rapid.IntRange(0, int(lists)-1).Draw(t, "list"))}
	switch {
	case l.Kind == Split && depth < 3:
		of := anyOperand(t, nested, depth+1)
		l.Of, l.Key = &of, rapid.SampledFrom([]string{"/", ", "}).Draw(t, "separator")
	case l.Kind == Split:
		l.Kind = Segments
	case l.Kind == QueryValues || l.Kind == HeaderValues:
		l.Key = anyText.Draw(t, "key")
	}
	return l
}

func anyExpr(t *rapid.T, nested, depth int) Expr {
	e := Expr{Op: Op(rapid.IntRange(0, int(ops)-1).Draw(t, "op"))}
	if depth > 3 && (e.Op == And || e.Op == Or || e.Op == Not || e.Op == Switch || e.Op == Some || e.Op == Every) {
		e.Op = True
	}
	n := 0
	switch e.Op {
	case And, Or:
		n = rapid.IntRange(1, 3).Draw(t, "n")
	case Not:
		n = 1
	case Some, Every:
		e.List, n = anyList(t, nested, 0), 1
		nested++
	case Switch:
		e.A, e.Set = anyOperand(t, nested, 0), []string{"a", "b"}
		n = 2
	case In:
		e.A, e.Set = anyOperand(t, nested, 0), rapid.SliceOfN(anyText, 0, 20).Draw(t, "set")
	case Matches:
		e.A, e.Pattern = anyOperand(t, nested, 0), rapid.SampledFrom([]string{"^a", "", "[a-z]+$"}).Draw(t, "pattern")
	case Listed:
		e.List = anyList(t, nested, 0)
	case CountIs, CountUp:
		e.List, e.N = anyList(t, nested, 0), rapid.IntRange(0, 5).Draw(t, "count")
	case Defined:
		e.A = anyOperand(t, nested, 0)
	case Equal, Differs, Less, AtMost, Prefix, Suffix, Contains:
		e.A, e.B = anyOperand(t, nested, 0), anyOperand(t, nested, 0)
	}
	for range n {
		e.Of = append(e.Of, anyExpr(t, nested, depth+1))
	}
	return e
}

var anyResponse = rapid.Custom(func(t *rapid.T) Response {
	r := Response{Allow: rapid.Bool().Draw(t, "allow")}
	if rapid.Bool().Draw(t, "when") {
		when := anyExpr(t, 0, 0)
		r.When = &when
	}
	if rapid.Bool().Draw(t, "send") {
		field := rapid.Custom(func(t *rapid.T) policy.HeaderField {
			return policy.HeaderField{Name: rapid.SampledFrom([]string{"x-a", "location"}).Draw(t, "name"), Value: anyText.Draw(t, "value")}
		})
		r.Send = &policy.Response{
			Status: rapid.SampledFrom([]int{0, 200, 599}).Draw(t, "status"), Body: anyText.Draw(t, "body"),
			Headers: some(t, field, "headers"), ResponseHeaders: some(t, field, "response headers"),
			RemoveHeaders: some(t, rapid.SampledFrom([]string{"cookie", "x-b"}), "removed"),
		}
	}
	return r
})

var anySource = rapid.Custom(func(t *rapid.T) Source {
	src := Source{
		Destination: anyText.Draw(t, "destination"), Generation: rapid.Uint64().Draw(t, "generation"),
		Grants: rapid.SliceOfN(anyGrant, 0, 4).Draw(t, "grants"),
	}
	src.Responses = rapid.SliceOfN(anyResponse, 0, 2).Draw(t, "responses")
	for i := range src.Grants {
		src.Grants[i].ID = "g" + string(rune('a'+i))
	}
	if rapid.Bool().Draw(t, "ends") {
		src.NotAfter = time.Unix(0, rapid.Int64().Draw(t, "end")).UTC()
	}
	for _, into := range []**Expr{&src.Deny, &src.Allow} {
		if rapid.Bool().Draw(t, "rego") {
			e := anyExpr(t, 0, 0)
			*into = &e
		}
	}
	return src
})

func TestDecodeReadsWhatEncodeWrites(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := anySource.Draw(t, "source")
		data := Encode(&want)
		got, err := decode(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Expr{}), cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
		if string(Encode(&got)) != string(data) {
			t.Fatal("what was read is written in another form")
		}
		p, err := Decode(data)
		if err != nil {
			t.Fatal(err)
		}
		// It answers as the one that was never written.
		q, err := New(want)
		if err != nil {
			t.Fatal(err)
		}
		in := &policy.Input{
			Source: "spiffe://a.test/web", Destination: want.Destination, Protocol: policy.HTTP, Method: "GET", Path: "/a", Query: "a=a&x-a=a",
			Headers: policy.HeaderMap{"x-a": {"a", "b"}, "a": {}},
		}
		if diff := cmp.Diff(q.Decide(in, instant), p.Decide(in, instant)); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestDecodeRefuses(t *testing.T) {
	src := Source{Destination: "spiffe://a.test/orders", Grants: []Grant{{ID: "a", Kind: Allow, Protocol: policy.HTTP}}, Allow: &Expr{Op: True}}
	good := Encode(&src)
	if _, err := Decode(good); err != nil {
		t.Fatal(err)
	}
	other := append([]byte{version + 1}, good[1:]...)
	for name, data := range map[string][]byte{"another version": other, "nothing": nil} {
		if _, err := Decode(data); !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %v; want ErrVersion", name, err)
		}
	}
	for n := 1; n < len(good); n++ {
		if _, err := Decode(good[:n]); err == nil {
			t.Errorf("the first %d of %d bytes were taken", n, len(good))
		}
	}
	for name, data := range map[string][]byte{
		"a byte more":          append(slices.Clip(good), 0),
		"too long":             append([]byte{version}, make([]byte, MaxBytes)...),
		"a count of 2^63":      {version, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f},
		"a number of 11 bytes": append([]byte{version}, []byte(strings.Repeat("\x80", 11))...),
		"a long form of zero":  {version, 0x80, 0x00},
	} {
		if _, err := Decode(data); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// A program that another process sends must not take more than it is worth, nor
// bring the reader down.
func FuzzDecode(f *testing.F) {
	for i := range 20 {
		src := anySource.Example(i)
		f.Add(Encode(&src))
	}
	f.Add([]byte{version, 1, 1, 'a', 0, 0, 0, 1, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		src, err := decode(data)
		if err != nil {
			return
		}
		if again := Encode(&src); len(again) > len(data) {
			t.Fatalf("%d bytes are written as %d", len(data), len(again))
		}
		p, err := New(src)
		if err != nil {
			return
		}
		p.Decide(&policy.Input{Source: "spiffe://a.test/web", Destination: src.Destination, Protocol: policy.HTTP, Path: "/a/b", Query: "a=b"}, instant)
	})
}

package replay

// A log is counted right whatever form it has, what is wrong in it is named by line and
// harms nothing else, and its length costs no memory.

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"

	"merlon.dev/policy"
	"merlon.dev/policy/engine"
	"merlon.dev/policy/grant"
)

const newPolicy = `grants:
  - {id: reads, from: [spiffe://x.test/web], to: [spiffe://x.test/orders], http: {methods: [GET]}}
  - {id: old, from: [spiffe://x.test/cart], to: [spiffe://x.test/orders], http: {}, expires: 2026-06-01T00:00:00Z}
`

func load(t testing.TB, grants string, modules map[string]string) *engine.Engine {
	t.Helper()
	parsed, err := grant.Parse([]grant.File{{Name: "grants.yaml", Data: []byte(grants)}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := engine.New(t.Context(), engine.Source{Modules: modules, Grants: parsed})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// line is an event as package decisionlog writes it.
func line(source, method, result, more string) string {
	return fmt.Sprintf(`{"labels":{"id":"n1"},"decision_id":"5b2f0c6d1a7e4f3b9c8d7e6f","bundles":{"main":{"revision":"3"}},"path":"merlon/decision",`+
		`"input":{"attributes":{"source":{"principal":"spiffe://x.test/%s"},"destination":{"principal":"spiffe://x.test/orders"},"request":{"http":{"method":%q,"path":"/orders/1"}}},"protocol":"http"},`+
		`"result":%s,"timestamp":"2026-05-01T10:00:00Z"%s}`, source, method, result, more)
}

const (
	denied  = `{"allow":false,"reason":"NO_GRANT","rule_id":""}`
	allowed = `{"allow":true,"reason":"ALLOWED","rule_id":"reads"}`
	other   = `{"allow":true,"reason":"ALLOWED","rule_id":"before"}`
)

func read(t testing.TB, e *engine.Engine, log string) (r *Report, bad []string, err error) {
	t.Helper()
	p := New(e, func(line int, err error) { bad = append(bad, fmt.Sprintf("%d: %v", line, err)) })
	err = p.Read(t.Context(), strings.NewReader(log))
	return p.Report(), bad, err
}

func TestReplayCounts(t *testing.T) {
	e := load(t, newPolicy, nil)
	log := strings.Join([]string{
		line("web", "GET", denied, ""),
		line("web", "GET", denied, ""),
		line("web", "GET", allowed, ""),
		line("web", "GET", other, `,"custom":{"merlon":{"allowed":50,"sample_rate":0.02}}`),
		line("web", "POST", other, `,"custom":{"merlon":{"allowed":10,"sample_rate":0.1,"dropped":7}}`),
		line("cart", "GET", `false`, ""), // had not ended then
		line("cart", "GET", `true`, ""),
		line("api", "GET", `{"allowed":true,"http_status":200}`, ""),
		strings.Replace(line("api", "GET", `null`, ""), `"result":null,`, "", 1), // undefined
		line("web", "GET", `{"allow":false,"reason":"REVOKED","rule_id":""}`, ""),
		line("web", "GET", denied, `,"erased":["/input"]`),
		line("web", "GET", denied, `,"erased":["/input/attributes/request/http/headers"]`), // no grant reads them
		`{"path":"system/log/mask","input":{},"result":true,"timestamp":"2026-05-01T10:00:00Z"}`,
		`{"msg":"Initializing server.","level":"info"}`,
		"",
		"[" + line("web", "GET", denied, "") + "," + line("web", "GET", denied, "") + "]",
	}, "\n")
	r, bad, err := read(t, e, log)
	if err != nil || len(bad) > 0 {
		t.Fatalf("%v, bad %q", err, bad)
	}
	if r.Events != 12 || r.Calls != 70 || r.Sampled != 2 || r.Missing != 7 || r.Erased != 1 || r.Other != 2 || r.Before[policy.Revoked] != 1 || r.Incomplete != 0 || r.Bad != 0 {
		t.Errorf("report %+v", r)
	}
	var got []string
	for _, g := range append(r.Changed, r.Otherwise...) {
		got = append(got, fmt.Sprintf("%s %v %s>%v %s: %d %g %d", g.Source[len("spiffe://x.test/"):], g.Before.Allow, g.Before.RuleID, g.After.Allow, g.After.RuleID, g.Events, g.Calls, g.Examples[0].Line))
	}
	want := []string{
		"web true before>false : 1 10 5", "web false >true reads: 5 5 1", "api true >false : 1 1 8", "cart false >true old: 1 1 6",
		"web true before>true reads: 1 50 4",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("groups\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if n := len(r.Changed[1].Examples); n != maxExamples {
		t.Errorf("%d examples; want %d", n, maxExamples)
	}

	// The same, compressed, in two pieces.
	var zipped bytes.Buffer
	for _, half := range []string{log[:1000], log[1000:]} {
		w := gzip.NewWriter(&zipped)
		_, _ = io.WriteString(w, half)
		_ = w.Close()
	}
	again, _, err := read(t, e, zipped.String())
	if err != nil || toJSON(t, again) != toJSON(t, r) {
		t.Errorf("compressed: %v\n%s\nwant\n%s", err, toJSON(t, again), toJSON(t, r))
	}
	if _, _, err := read(t, e, zipped.String()[:zipped.Len()/3]); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut off: %v; want an error", err)
	}
}

func toJSON(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestBadLinesAreNamedAndTheRestGoesOn(t *testing.T) {
	good := line("web", "GET", denied, "")
	bad := map[string]string{
		"{":                                   "unexpected end",
		"rubbish":                             "invalid character",
		`{"a":1}`:                             "is no event",
		`"text"`:                              "cannot unmarshal",
		"[" + good + ",":                      "EOF",
		line("web", "GET", `"yes"`, ""):       "its result is no decision",
		line("web", "GET", `{"a":1}`, ""):     "its result is no decision",
		line("..", "GET", denied, ""):         "is not a SPIFFE ID",
		strings.Replace(good, "2026", "x", 1): "parsing time",
		strings.Replace(good, `,"timestamp":"2026-05-01T10:00:00Z"`, "", 1): "has no timestamp",
		strings.Replace(good, `"protocol":"http"`, `"protocol":"udp"`, 1):   "protocol",
		strings.Repeat(" x", maxLine/2+1):                                   "is longer than",
	}
	for text, want := range bad {
		r, said, err := read(t, load(t, newPolicy, nil), good+"\n"+text+"\n"+good)
		events := 2
		if strings.HasPrefix(text, "[") {
			events = 3
		}
		if err != nil || r.Bad != 1 || len(said) != 1 || !strings.HasPrefix(said[0], "2: ") || !strings.Contains(said[0], want) || r.Events != events {
			t.Errorf("%.60s: %q, %v, %d events; want 2: … %s, and the lines around", text, said, err, r.Events, want)
		}
	}
}

// What is missing is told about where the policy may read it.
func TestMissingPartsCountWhereThePolicyReadsThem(t *testing.T) {
	rego := map[string]string{"a.rego": "package authz\n\nallow if input.attributes.request.http.headers[\"x-team\"] == \"shop\"\n"}
	for more, want := range map[string]struct{ grants, rego int }{
		`,"erased":["/input/attributes/request/http/headers"]`:        {0, 1},
		`,"erased":["/input/attributes/request/http/headers/x-team"]`: {0, 1},
		`,"erased":["/input/attributes/request/http/headers/cookie"]`: {0, 0},
		`,"masked":["/input/attributes/source/principal"]`:            {1, 1},
		`,"erased":["/input/parsed_query"]`:                           {0, 0},
		`,"custom":{"merlon":{"incomplete":["headers","rule_id"]}}`:   {0, 1},
		`,"custom":{"merlon":{"incomplete":["path"]}}`:                {1, 1},
		`,"erased":["/result"]`:                                       {0, 0},
	} {
		for _, p := range []struct {
			e    *engine.Engine
			want int
		}{{load(t, newPolicy, nil), want.grants}, {load(t, newPolicy, rego), want.rego}} {
			r, bad, err := read(t, p.e, line("web", "GET", denied, more))
			if err != nil || len(bad) > 0 || r.Incomplete != p.want || r.Changed[0].Incomplete != p.want {
				t.Errorf("%s: %+v, %q, %v; want %d that is not whole", more, r, bad, err, p.want)
			}
		}
	}
}

func TestMemoryIsBounded(t *testing.T) {
	e := load(t, newPolicy, nil)
	in, out := io.Pipe()
	const n = maxGroups + 2000
	go func() {
		for i := range n {
			if _, err := fmt.Fprintln(out, line(fmt.Sprintf("s%d/%s", i, strings.Repeat("x", 1000)), "GET", allowed, "")); err != nil {
				return
			}
		}
		_ = out.Close()
	}()
	before := heap()
	r := New(e, func(line int, err error) { t.Errorf("%d: %v", line, err) })
	if err := r.Read(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	grown := int64(heap()) - int64(before)
	report := r.Report()
	if len(report.Changed) != maxGroups || report.Ungrouped != n-maxGroups || report.Events != n {
		t.Errorf("%d groups, %d without, %d events", len(report.Changed), report.Ungrouped, report.Events)
	}
	if grown > 64<<20 {
		t.Errorf("%d MiB are kept of a log", grown>>20)
	}
	runtime.KeepAlive(r)
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestReadEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := New(load(t, newPolicy, nil), func(int, error) {}).Read(ctx, strings.NewReader(line("web", "GET", denied, ""))); !errors.Is(err, context.Canceled) {
		t.Errorf("%v; want that it was cancelled", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(line("web", "GET", denied, "")))
	f.Add([]byte("[" + line("web", "GET", allowed, `,"erased":["/input"]`) + "]\n{\n"))
	f.Add([]byte{0x1f, 0x8b, 0})
	e := load(f, newPolicy, nil)
	f.Fuzz(func(t *testing.T, log []byte) {
		bad := 0
		r := New(e, func(line int, err error) {
			if bad++; line < 1 || err == nil {
				t.Errorf("line %d: %v", line, err)
			}
		})
		_ = r.Read(t.Context(), bytes.NewReader(log))
		if report := r.Report(); report.Bad != bad || report.Events < len(report.Changed) {
			t.Errorf("%+v; %d bad lines were told of", report, bad)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	e := load(b, newPolicy, nil)
	log := strings.Repeat(line("web", "GET", denied, "")+"\n", 1000)
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		if err := New(e, func(int, error) {}).Read(b.Context(), strings.NewReader(log)); err != nil {
			b.Fatal(err)
		}
	}
}

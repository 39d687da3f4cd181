// What is written of a decision, in OPA's form: a golden file that OPA's own types
// read (integration/opaevents), and nothing that the mask does not show.

package decisionlog

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"merlon.dev/policy"
)

var update = flag.Bool("update", false, "write the golden events anew")

const golden = "testdata/events.golden.jsonl"

// one is the event of one decision.
func (f *Format) one(t testing.TB, in *policy.Input, d policy.Decision, standsFor, dropped uint64) []byte {
	t.Helper()
	r := NewRecorder(Options{Records: 2})
	r.Add(in, &d, instant, standsFor, 0)
	var line []byte
	r.Take(1, func(rec *Record) { line = f.Line(rec, dropped) })
	return line
}

func TestGoldenEvents(t *testing.T) {
	id := policy.DecisionID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	f := Format{
		Labels: func() map[string]string {
			return map[string]string{"id": "spiffe://shop.test/agent/n1", "app": "merlon-agent"}
		},
		Bundle: "main", Mask: Mask{Headers: []string{"x-request-id"}, Query: []string{"page"}},
	}
	call := policy.Input{
		Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: policy.HTTP, Method: "POST", Path: "/orders/1",
		Query: "page=2&token=canary", Host: "orders:8443", SourceAddress: "10.0.0.1:4711", DestinationAddress: "[::1]:8443", SourceSerial: "ab12",
		Headers: policy.HeaderMap{"x-request-id": {"r1", "r2"}, "x-secret": {"canary"}},
	}
	rpc, nobody := call, policy.Input{Destination: call.Destination, Protocol: policy.HTTP, Path: strings.Repeat("/x", 600)}
	rpc.Protocol, rpc.Path, rpc.Query, rpc.Headers = policy.GRPC, "/shop.Orders/Get", "", nil
	tcp := policy.Input{Source: call.Source, Destination: call.Destination, Protocol: policy.TCP, SourceAddress: call.SourceAddress}
	lines := [][]byte{
		f.one(t, &call, policy.Decision{Reason: policy.MethodNotGranted, DecisionID: id, Revision: 7}, 1, 3),
		f.one(t, &rpc, policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "web-reads", DecisionID: id, Revision: 7}, 40, 0),
		f.one(t, &tcp, policy.Decision{Allow: true, Reason: policy.Allowed, RuleID: "rego:allow", DecisionID: id, Revision: 7, DryRun: []string{"a", "b"}}, 1, 0),
		f.one(t, &nobody, policy.Decision{Reason: policy.NoIdentity, DecisionID: id}, 1, 0),
		f.one(t, &tcp, policy.Decision{LetThrough: true, Reason: policy.NoGrant, DecisionID: id, Revision: 7}, 1, 0),
	}
	got := append(bytes.Join(lines, []byte("\n")), '\n')
	if *update {
		if err := os.WriteFile(golden, got, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("events are now\n%s\nrather than\n%s", got, want)
	}
}

// The input of an event is a call that Merlon reads again: `merlon policy replay`
// decides it anew.
func TestEventsAreReadAgain(t *testing.T) {
	in := &policy.Input{
		Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: policy.GRPC, Method: "POST", Path: "/shop.Orders/Get",
		Host: "orders:8443", SourceAddress: "10.0.0.1:4711", DestinationAddress: "10.0.0.2:8443", Headers: policy.HeaderMap{"x-a": {"1", "2"}},
	}
	f := Format{Mask: Mask{Headers: []string{"x-a"}}}
	var e struct {
		Input json.RawMessage `json:"input"`
	}
	if err := json.Unmarshal(f.one(t, in, policy.Decision{Reason: policy.NoGrant}, 1, 0), &e); err != nil {
		t.Fatal(err)
	}
	got, err := policy.ParseInput(e.Input)
	if err != nil || !reflect.DeepEqual(got, in) {
		t.Errorf("ParseInput() = %+v, %v; want %+v", got, err, in)
	}
}

// SECURITY.md T37: what is not listed never appears, and what is a secret by its
// meaning does not even where it is listed.
func TestMaskedPartsNeverAppear(t *testing.T) {
	secret := append([]string{"x-session", "x-internal", "forwarded"}, secretHeaders...)
	rapid.Check(t, func(t *rapid.T) {
		in := &policy.Input{Source: "spiffe://a.test/web", Destination: "spiffe://a.test/orders", Protocol: policy.HTTP, Method: "GET", Path: "/"}
		in.Headers = policy.HeaderMap{"x-shown": {"shown"}}
		for _, name := range rapid.SliceOf(rapid.SampledFrom(secret)).Draw(t, "headers") {
			in.HeaderMap()[name] = []string{"canary-value"}
		}
		var parts []string
		for _, name := range rapid.SliceOfN(rapid.SampledFrom([]string{"token", "page", "to%6ben", "page%00", "Page", "%zz"}), 1, 6).Draw(t, "query") {
			value := "canary-value"
			if name == "page" {
				value = "shown"
			}
			parts = append(parts, name+"="+value)
		}
		in.Query = strings.Join(parts, "&")
		f := Format{Mask: Mask{Headers: append([]string{"x-shown"}, secretHeaders...), Query: []string{"page"}}}
		r := NewRecorder(Options{Records: 2})
		r.Record(in, &policy.Decision{Reason: policy.NoGrant}, instant)
		r.Take(1, func(rec *Record) {
			line := string(f.Line(rec, 0))
			var said struct {
				Erased []string `json:"erased"`
				Custom custom   `json:"custom"`
			}
			if err := json.Unmarshal([]byte(line), &said); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(line, "canary") || strings.Contains(line, "x-session") || !strings.Contains(line, `"x-shown":["shown"]`) {
				t.Fatalf("%+v is written as %s", in, line)
			}
			told := slices.Contains(said.Erased, erasedHeaders) || slices.Contains(said.Custom.Merlon.Incomplete, "headers")
			if told != (len(in.HeaderMap()) > 1) {
				t.Fatalf("%s does not say that there were other headers", line)
			}
			if strings.Contains(in.Query, "canary") != strings.Contains(line, erasedQuery) {
				t.Fatalf("%s of the query %s", line, in.Query)
			}
		})
	})
}

// SECURITY.md T36: one event is one line, whatever a caller sends.
func TestOneEventIsOneLine(t *testing.T) {
	nasty := []string{"\n{\"decision_id\":\"forged\"}\n", "\r\n", "\x1b[31m", "\u2028", "\u009b31m", "\u202e", "\x7f", "\ufeff", "\xff\xfe", `","allow":true,"x":"`, "\x00"}
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.Custom(func(t *rapid.T) string {
			return strings.Join(rapid.SliceOf(rapid.OneOf(rapid.SampledFrom(nasty), rapid.String())).Draw(t, "parts"), "")
		})
		in := &policy.Input{
			Source: text.Draw(t, "source"), Destination: text.Draw(t, "destination"), Protocol: policy.HTTP, Method: text.Draw(t, "method"), Path: text.Draw(t, "path"),
			Query: text.Draw(t, "query"), Host: text.Draw(t, "host"), SourceAddress: text.Draw(t, "address"), SourceSerial: text.Draw(t, "serial"),
			Headers: policy.HeaderMap{"x": {text.Draw(t, "value")}},
		}
		r := NewRecorder(Options{Records: 2})
		r.Record(in, &policy.Decision{Reason: policy.NoGrant, RuleID: text.Draw(t, "rule")}, instant)
		f := Format{Mask: Mask{Headers: []string{"x"}}}
		r.Take(1, func(rec *Record) {
			line := f.Line(rec, 0)
			var e struct {
				Result result `json:"result"`
			}
			if err := json.Unmarshal(line, &e); err != nil || bytes.ContainsFunc(line, func(r rune) bool { return r < ' ' || obeyed(r) }) || e.Result.Allow {
				t.Fatalf("%q, %v", line, err)
			}
		})
	})
}

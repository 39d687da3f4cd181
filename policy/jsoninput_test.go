// Calls as JSON: both shapes, and what is refused.

package policy

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"
)

func TestParseInputReadsBothForms(t *testing.T) {
	tests := map[string]struct {
		json string
		want Input
	}{
		"short": {
			`{"source":"spiffe://shop.test/web","destination":"spiffe://shop.test/orders","protocol":"http","method":"GET","path":"/orders/1","headers":{"X-A":["1","2"]}}`,
			Input{Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: HTTP, Method: "GET", Path: "/orders/1", Headers: HeaderMap{"x-a": {"1", "2"}}},
		},
		"short, query": {`{"source":"","protocol":"http","path":"/a?b=/../c"}`, Input{Protocol: HTTP, Path: "/a", Query: "b=/../c"}},
		"short, tcp":   {`{"source":"spiffe://shop.test/web","destination":"spiffe://shop.test/db","protocol":"tcp"}`, Input{Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/db", Protocol: TCP}},
		"envoy": {
			`{"attributes":{"source":{"principal":"spiffe://shop.test/web","address":{"socketAddress":{"address":"10.0.0.1","portValue":4711}}},
			"destination":{"principal":"spiffe://shop.test/orders"},"request":{"http":{"method":"GET","path":"/orders?x=1","host":"orders","headers":{"Content-Type":"application/grpc"},"id":"1"}}},
			"parsed_path":["orders"],"version":{"ext_authz":"v3"}}`,
			Input{
				Source: "spiffe://shop.test/web", Destination: "spiffe://shop.test/orders", Protocol: HTTP, Method: "GET", Path: "/orders", Query: "x=1",
				Host: "orders", SourceAddress: "10.0.0.1:4711", Headers: HeaderMap{"content-type": {"application/grpc"}},
			},
		},
		"envoy, protocol set": {
			`{"attributes":{"source":{"principal":"spiffe://shop.test/web"},"request":{"http":{"method":"POST","path":"/shop.Orders/Get"}}},"protocol":"grpc"}`,
			Input{Source: "spiffe://shop.test/web", Protocol: GRPC, Method: "POST", Path: "/shop.Orders/Get"},
		},
		"short, with claims": {
			`{"protocol":"tcp","jwt":{"sub":"spiffe://shop.test/buyer","n":1}}`,
			Input{Protocol: TCP, JWT: map[string]any{"sub": "spiffe://shop.test/buyer", "n": 1.0}},
		},
		"envoy, with claims": {`{"attributes":{},"jwt":{"aud":["a"]}}`, Input{Protocol: TCP, JWT: map[string]any{"aud": []any{"a"}}}},
		"envoy, no request":  {`{"attributes":{"source":{"principal":"spiffe://shop.test/web"}}}`, Input{Source: "spiffe://shop.test/web", Protocol: TCP}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := ParseInput([]byte(tt.json))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, *got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseInputRefusesBadLines(t *testing.T) {
	for json, want := range map[string]string{
		``:                                       "EOF",
		`{`:                                      "unexpected EOF",
		`[]`:                                     "cannot unmarshal",
		`null`:                                   "protocol",
		`{}`:                                     `protocol "" is none of`,
		`{"protocol":"HTTP"}`:                    `protocol "HTTP" is none of`,
		`{"protocol":"http","sourse":"x"}`:       `unknown field "sourse"`,
		`{"protocol":"http","path":1}`:           "cannot unmarshal",
		`{"protocol":"tcp"} {}`:                  "more than one JSON value",
		`{"protocol":"tcp","source":"web"}`:      "is not a SPIFFE ID",
		`{"protocol":"tcp","headers":{"a":"b"}}`: "cannot unmarshal",
		`{"protocol":"tcp","destination":"spiffe://SHOP/x"}`:                     "is not a SPIFFE ID",
		`{"attributes":{"source":{"principal":"CN=web"}}}`:                       "is not a SPIFFE ID",
		"{\"protocol\":\"http\",\"path\":\"/\xff\"}":                             "is not valid UTF-8",
		`{"protocol":"tcp","source":"spiffe://a/b","source":"spiffe://a/c"}`:     `"source" occurs twice`,
		`{"protocol":"tcp","source":"spiffe://a/b","Source":"spiffe://a/c"}`:     `"Source" occurs twice`,
		`{"attributes":{"request":{"http":{"path":"/a","path":"/b"}}}}`:          `"path" occurs twice`,
		`{"protocol":"http","headers":{"A":[],"b":["\ufffd"]}}`:                  `U+FFFD`,
		`{"protocol":"http","path":"/\ud800"}`:                                   `U+FFFD`,
		`{"attributes":null}`:                                                    "attributes is null",
		`{"attributes":{},"protocol":"udp"}`:                                     "is none of",
		`{"protocol":"tcp","path":"` + strings.Repeat("a", MaxInputBytes) + `"}`: "longer than",
	} {
		if _, err := ParseInput([]byte(json)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseInput(%.80s) = %v; want %q", json, err, want)
		}
	}
}

func TestMarshalledInputParsesBack(t *testing.T) {
	name := rapid.StringMatching(`spiffe://[a-z0-9.-]{1,8}(/[a-zA-Z0-9_-]{1,5}){0,3}`)
	// A surrogate drawn as a rune becomes U+FFFD in a Go string.
	path := rapid.StringMatching(`(/[^?\x00-\x1f\x{fffd}]{0,4}){0,3}`).Filter(func(s string) bool { return !strings.ContainsRune(s, utf8.RuneError) })
	rapid.Check(t, func(t *rapid.T) {
		want := &Input{
			Source: name.Draw(t, "source"), Destination: name.Draw(t, "destination"),
			Protocol: rapid.SampledFrom([]Protocol{HTTP, GRPC, TCP}).Draw(t, "protocol"),
			Method:   rapid.StringMatching(`[A-Z]{0,6}`).Draw(t, "method"),
			Path:     path.Draw(t, "path"), Query: rapid.StringMatching(`[a-z=?]{0,4}`).Draw(t, "query"),
		}
		data, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseInput(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestSPIFFEIDsAreThoseOfGoSPIFFE(t *testing.T) {
	piece := rapid.SampledFrom([]string{"spiffe://", "td", "/", "a", ".", "..", "A", "%61", "é", "\x00", "-", "_", ":80", "@", "?", "#", "SPIFFE://", "10.0.0.1"})
	rapid.Check(t, func(t *rapid.T) {
		s := strings.Join(rapid.SliceOfN(piece, 0, 7).Draw(t, "pieces"), "")
		id, err := spiffeid.FromString(s)
		want := err == nil && id.String() == s
		if got := isSPIFFEID(s); got != want {
			t.Fatalf("isSPIFFEID(%q) = %v; go-spiffe: %v (%v)", s, got, want, err)
		}
	})
	if !isSPIFFEID("spiffe://td/"+strings.Repeat("a", 2048-12)) || isSPIFFEID("spiffe://td/"+strings.Repeat("a", 2048-11)) {
		t.Error("SPIFFE IDs have up to 2048 bytes (ID6)")
	}
	if !isSPIFFEID("spiffe://"+strings.Repeat("a", 255)) || isSPIFFEID("spiffe://"+strings.Repeat("a", 256)) {
		t.Error("trust domains have up to 255 bytes (ID7)")
	}
}

func TestAnswerHasItsKeysInOrder(t *testing.T) {
	got, err := json.Marshal(Decision{Allow: true, Reason: Allowed, RuleID: "web-reads-orders", DecisionID: NewDecisionID()}.Answer("opa"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"allow":true,"reason":"ALLOWED","rule_id":"web-reads-orders","engine":"opa"}`; string(got) != want {
		t.Errorf("got %s; want %s", got, want)
	}
}

func FuzzParseInput(f *testing.F) {
	f.Add([]byte(`{"source":"spiffe://a/b","destination":"spiffe://a/c","protocol":"http","method":"GET","path":"/x?y"}`))
	f.Add([]byte(`{"attributes":{"source":{"principal":"spiffe://a/b"},"request":{"http":{"path":"/"}}}}`))
	f.Add([]byte(`{"attributes":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		in, err := ParseInput(data)
		if err == nil && in.Protocol != HTTP && in.Protocol != GRPC && in.Protocol != TCP {
			t.Errorf("accepted protocol %q", in.Protocol)
		}
	})
}

// What is kept of a chunk of a decision log, and under whose name.

package report

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// event makes an event about a destination, with more fields where wanted.
func eventAbout(destination, more string) string {
	return fmt.Sprintf(`{"labels":{"id":"i1"},"decision_id":"d1","timestamp":"2026-11-26T04:00:00Z","input":{"attributes":{"destination":{"principal":%q}}}%s}`, destination, more)
}

func own(destination string) bool { return destination == "spiffe://shop.test/orders" }

func TestDecisionsAreKeptWithTheirUploader(t *testing.T) {
	body := "[" + strings.Join([]string{
		eventAbout("spiffe://shop.test/orders", `,"result":{"allow":false},"x":"a\nb`+"\u009b31m\u202e\x9b"+`"`),
		eventAbout("spiffe://shop.test/other", ``),
		`{"decision_id":"d3","timestamp":"2026-11-26T04:00:00Z","input":{"user":"eve"},"labels":{"uploader":"spiffe://shop.test/forged"},"Labels":{"uploader":"spiffe://shop.test/forged"}}`,
		`{"decision_id":"d4","timestamp":"2026-11-26T04:00:00Z","input":{"destination":"spiffe://shop.test/other"}}`,
		`{"decision_id":"d5","timestamp":"2026-11-26T04:00:00Z","input":{"destination":["spiffe://shop.test/orders"]}}`,
		`{"decision_id":"d6","timestamp":"2026-11-26T04:00:00Z","input":{"destination":"spiffe://shop.test/other","Destination":"spiffe://shop.test/orders"}}`,
		`{"decision_id":"d7","timestamp":"2026-11-26T04:00:00Z"}`,
	}, ",\n") + "]"
	c, err := ParseDecisions([]byte(body), "spiffe://shop.test/orders", own)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, line := range c.Events {
		var e struct {
			ID     string            `json:"decision_id"`
			Labels map[string]string `json:"labels"`
		}
		if err := json.Unmarshal(line, &e); err != nil || bytes.ContainsAny(line, "\n\r\u009b\u202e") || !utf8.Valid(line) || bytes.Contains(line, []byte("forged")) || e.Labels["uploader"] != "spiffe://shop.test/orders" {
			t.Errorf("%s: %v; want one line with the uploader", line, err)
		}
		ids = append(ids, e.ID)
	}
	if diff := cmp.Diff([]string{"d1", "d3", "d7"}, ids); diff != "" || c.Foreign != 4 {
		t.Errorf("%d foreign, kept %s", c.Foreign, diff)
	}
}

func TestMalformedDecisionsAreRefusedWhole(t *testing.T) {
	good, small := eventAbout("spiffe://shop.test/orders", ""), `{"decision_id":"d","timestamp":"2026-11-26T04:00:00Z"}`
	for name, body := range map[string]string{
		"empty":             ``,
		"an object":         good,
		"no end":            `[` + good,
		"something behind":  `[` + good + `] {}`,
		"a number":          `[` + good + `, 1]`,
		"null":              `[` + good + `, null]`,
		"no decision ID":    `[` + good + `, {"timestamp":"2026-11-26T04:00:00Z"}]`,
		"no time":           `[` + good + `, {"decision_id":"d"}]`,
		"labels of numbers": `[` + good + `, {"decision_id":"d","timestamp":"2026-11-26T04:00:00Z","labels":{"a":1}}]`,
		"a long event":      `[` + eventAbout("spiffe://shop.test/orders", `,"x":"`+strings.Repeat("x", maxEventBytes)+`"`) + `]`,
		"deep":              `[` + eventAbout("spiffe://shop.test/orders", `,"x":`+strings.Repeat("[", 20_000)+strings.Repeat("]", 20_000)) + `]`,
		"too many":          `[` + small + strings.Repeat(`,`+small, maxEvents) + `]`,
	} {
		if c, err := ParseDecisions([]byte(body), "u", own); !errors.As(err, new(*InvalidError)) || len(c.Events) > 0 {
			t.Errorf("%s: %d events, %v; want none and an InvalidError", name, len(c.Events), err)
		}
	}
}

// Whatever is taken of a chunk are JSON objects, one a line, with the uploader that
// was proved; and what is refused leaves nothing.
func FuzzParseDecisions(f *testing.F) {
	f.Add([]byte("[" + eventAbout("spiffe://shop.test/orders", `,"custom":{"a":[1,2]}`) + "]"))
	f.Add([]byte(`[{"decision_id":"d","timestamp":"2026-11-26T04:00:00Z","LABELS":{"uploader":"x"},"input":{"destination":null}}]`))
	f.Add([]byte("[]"))
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := ParseDecisions(body, "the uploader", own)
		if err != nil && (len(c.Events) > 0 || !errors.As(err, new(*InvalidError))) {
			t.Fatalf("%d events with %v", len(c.Events), err)
		}
		for _, line := range c.Events {
			var e event
			if err := json.Unmarshal(line, &e); err != nil || e.Labels[uploaderLabel] != "the uploader" || e.DecisionID == "" || bytes.ContainsAny(line, "\n\r") {
				t.Fatalf("%q: %v", line, err)
			}
			for _, id := range destinations(e.Input) {
				if !own(id) {
					t.Fatalf("%q is about %q", line, id)
				}
			}
		}
	})
}

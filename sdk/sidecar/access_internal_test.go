// The access log: JSON, one line a request, whatever is in a request.

package sidecar

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"

	"pgregory.net/rapid"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

func TestAnythingIsOneLineOfJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bytes := rapid.SliceOf(rapid.Byte())
		path := string(bytes.Draw(t, "path"))
		method := rapid.String().Draw(t, "method")
		e := &hop.Entry{Begun: time.Now(), Path: path, Method: method, Status: 200, DecisionID: policy.NewDecisionID()}
		line := string(appendEntry(nil, &hop.Hop{Name: "x", Direction: hop.Inbound}, e))
		if strings.IndexByte(line, '\n') != len(line)-1 {
			t.Fatalf("not one line: %q", line)
		}
		for _, r := range strings.TrimSuffix(line, "\n") {
			if unicode.IsControl(r) {
				t.Fatalf("a control character in %q", line)
			}
		}
		var got map[string]any
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		want := string([]rune(strings.ToValidUTF8(method, "\uFFFD")))
		if said, _ := got["method"].(string); said != want {
			t.Fatalf("method %q in the log; want %q", said, want)
		}
		if got["decision_id"] != e.DecisionID.String() || got["status"] != 200.0 {
			t.Fatalf("the line %q", line)
		}
	})
}

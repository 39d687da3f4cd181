// Bytes of the disk: what the agent remembers of its CA.

package caclient

import (
	"encoding/json"
	"reflect"
	"testing"
)

// What is remembered is of this trust domain, and says the same again; a log that has
// fewer than no entries would let any other go on from it.
func FuzzMemory(f *testing.F) {
	for _, s := range []string{
		`{"trust_domain":"example.test","revision":7,"heard":"2026-01-01T00:00:00Z","opening":"AA=="}`,
		`{"trust_domain":"example.test","logs":{"example.test/ca/ca-1":{"size":3,"root":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=","at":"2026-01-01T00:00:00Z"}}}`,
		`{"trust_domain":"example.test","logs":{"a":{"size":-1}}}`, `{"trust_domain":"other.test"}`, `{}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		if seen, err := decodeSeen(content, "example.test"); err == nil {
			text, err := json.Marshal(seen)
			again, bad := decodeSeen(text, "example.test")
			if err == nil && (bad != nil || again.Revision != seen.Revision || !again.Heard.Equal(seen.Heard) || string(again.Opening) != string(seen.Opening)) {
				t.Fatalf("%q is read as %+v, and then as %+v, %v", content, seen, again, bad)
			}
		} else if !reflect.ValueOf(seen).IsZero() {
			t.Fatalf("%q is refused, and read as %+v", content, seen)
		}
		logs, err := decodeLogs(content, "example.test")
		if err != nil {
			if len(logs.Logs) > 0 {
				t.Fatalf("%q is refused, and read as %+v", content, logs)
			}
			return
		}
		for origin, log := range logs.Logs {
			if log.Size < 0 {
				t.Fatalf("log %q has %d entries", origin, log.Size)
			}
		}
		text, err := json.Marshal(logs)
		again, bad := decodeLogs(text, "example.test")
		if err == nil && (bad != nil || len(again.Logs) != len(logs.Logs)) {
			t.Fatalf("%q is read as %+v, and then as %+v, %v", content, logs, again, bad)
		}
	})
}

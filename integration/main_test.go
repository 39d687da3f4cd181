// Package integration_test starts the real binaries and looks at them from
// outside, as operators and workloads do.
package integration_test

import (
	"fmt"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}

// expect compares the outcome of a command: expect(run(…))(code, text).
func expect(out string, code int) func(wantCode int, wantText string) error {
	return func(wantCode int, wantText string) error {
		if code != wantCode || !strings.Contains(out, wantText) {
			return fmt.Errorf("exit code %d; want %d and %q\n%s", code, wantCode, wantText, out)
		}
		return nil
	}
}

// entryOf is the ID of the only entry for a path.
func entryOf(t *testing.T, d *stage.Domain, path string) string {
	t.Helper()
	var entries []struct {
		EntryID string `json:"entry_id"`
	}
	stage.Decode(t, d.Merlon("entry", "list", "--spiffe-id", d.ID(path), "-o", "json"), &entries)
	if len(entries) != 1 {
		t.Fatalf("%d entries for %s; want 1", len(entries), path)
	}
	return entries[0].EntryID
}

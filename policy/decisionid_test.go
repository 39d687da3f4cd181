package policy

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
)

func TestDecisionIDs(t *testing.T) {
	seen := map[DecisionID]bool{}
	for range 1000 {
		id := NewDecisionID()
		if id.IsZero() || seen[id] {
			t.Fatalf("NewDecisionID() = %s again, or zero", id)
		}
		seen[id] = true
		if !regexp.MustCompile(`^[0-9a-f]{24}$`).MatchString(id.String()) {
			t.Fatalf("String() = %q; want 24 lower-case hex digits", id)
		}
		if back, err := ParseDecisionID(id.String()); err != nil || back != id {
			t.Fatalf("ParseDecisionID(%s) = %s, %v", id, back, err)
		}
	}
	id, _ := ParseDecisionID("00112233445566778899aabb")
	if got, err := json.Marshal(map[string]any{"id": id}); err != nil || string(got) != `{"id":"00112233445566778899aabb"}` {
		t.Errorf("Marshal() = %s, %v", got, err)
	}
	for _, bad := range []string{"", "0", strings.Repeat("A", 24), strings.Repeat("g", 24), strings.Repeat("0", 25), strings.Repeat("0", 12) + "\n" + strings.Repeat("0", 11)} {
		if id, err := ParseDecisionID(bad); err == nil || !id.IsZero() {
			t.Errorf("ParseDecisionID(%q) = %s, %v; want an error", bad, id, err)
		}
	}
}

func TestDecisionIDAllocatesNothing(t *testing.T) {
	var id DecisionID
	if n := testing.AllocsPerRun(100, func() { id = NewDecisionID() }); n != 0 || id.IsZero() {
		t.Errorf("NewDecisionID() allocates %v times", n)
	}
}

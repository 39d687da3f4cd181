// What operators read of a decision.

package main

import (
	"bytes"
	"strings"
	"testing"

	"merlon.dev/agent/agentpb"
)

func TestExplainedDecisionSaysWhatWasDoneAboutIt(t *testing.T) {
	for name, tt := range map[string]struct {
		decision   *agentpb.Decision
		text, json string
	}{
		"allowed":     {&agentpb.Decision{Allow: true, Reason: "ALLOWED", RuleId: "web"}, " allowed: ALLOWED by web (", `"allow": true,`},
		"denied":      {&agentpb.Decision{Reason: "NO_GRANT"}, " denied: NO_GRANT (", `"allow": false,`},
		"let through": {&agentpb.Decision{Reason: "NO_GRANT", LetThrough: true}, " denied, and let through by audit mode: NO_GRANT (", `"let_through": true,`},
	} {
		for output, want := range map[string]string{"table": tt.text, "json": tt.json} {
			var out bytes.Buffer
			if err := printDecision(&out, &options{output: output}, &agentpb.ExplainDecisionResponse{Decision: tt.decision}); err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(out.String(), want) || strings.Contains(out.String(), "let") != tt.decision.GetLetThrough() {
				t.Errorf("%s, %s: %s; want %q", name, output, &out, want)
			}
		}
	}
}

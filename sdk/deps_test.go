// Programs that only enforce stay small: no OPA, and nothing of CA or agent
// but the generated protocol.

package sdk_test

import (
	"os/exec"
	"strings"
	"testing"
)

func TestNoOPAIsLinked(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "merlon.dev/sdk/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for pkg := range strings.Lines(string(out)) {
		pkg = strings.TrimSpace(pkg)
		switch {
		case pkg == "merlon.dev/agent/agentpb", pkg == "merlon.dev/policy", pkg == "merlon.dev/policy/kept", pkg == "merlon.dev/policy/decisionlog", pkg == "merlon.dev/policy/program", pkg == "merlon.dev/policy/comparison", pkg == "merlon.dev/policy/denial", pkg == "merlon.dev/policy/strictyaml":
		case strings.HasPrefix(pkg, "merlon.dev/ca"), strings.HasPrefix(pkg, "merlon.dev/agent"), strings.HasPrefix(pkg, "merlon.dev/policy"),
			strings.Contains(pkg, "open-policy-agent"), strings.Contains(pkg, "smallstep"), strings.Contains(pkg, "badger"):
			t.Errorf("the SDK links %s", pkg)
		}
	}
}

// What exports metrics and traces is three times as large as the SDK: only those who
// ask for it by merlon.dev/sdk/otel have it.
func TestNoExporterIsLinkedUnasked(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "merlon.dev/sdk", "merlon.dev/sdk/httpauth", "merlon.dev/sdk/grpcauth").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for pkg := range strings.Lines(string(out)) {
		pkg = strings.TrimSpace(pkg)
		for _, heavy := range []string{"go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters", "go.opentelemetry.io/contrib", "go.opentelemetry.io/proto"} {
			if strings.HasPrefix(pkg, heavy) {
				t.Errorf("the SDK links %s", pkg)
			}
		}
	}
}

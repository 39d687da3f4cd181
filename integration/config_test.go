// The documented configurations hold every setting there is, and are valid.

package integration_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"testing"

	"merlon.dev/integration/stage"
)

func TestExampleConfigsAreCompleteAndValid(t *testing.T) {
	for _, tc := range []struct{ binary, example, source string }{
		{"merlon-ca", "../examples/config/ca.yaml", "../ca/internal/config/config.go"},
		{"merlon-agent", "../examples/config/agent.yaml", "../agent/config.go"},
		{"merlon-sidecar", "../examples/config/sidecar.yaml", "../sdk/sidecar/config.go"},
	} {
		if _, stderr, err := stage.Run(t.Context(), t, nil, tc.binary, "-config", tc.example, "-validate"); err != nil {
			t.Errorf("%s -config %s -validate: %v\n%s", tc.binary, tc.example, err, stderr)
		}
		text, err := os.ReadFile(tc.example)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range settings(t, tc.source) {
			if !regexp.MustCompile(`(?m)^` + key + `:`).Match(text) {
				t.Errorf("%s does not show %s", tc.example, key)
			}
		}
	}
}

// settings are the keys of the Config struct in a source file; of join_token
// and join_token_file the example can show only one.
func settings(t *testing.T, file string) []string {
	t.Helper()
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	ast.Inspect(parsed, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != "Config" {
			return true
		}
		for _, field := range spec.Type.(*ast.StructType).Fields.List {
			tag, err := strconv.Unquote(field.Tag.Value)
			if err != nil {
				t.Fatal(err)
			}
			if key := reflect.StructTag(tag).Get("yaml"); key != "-" && key != "join_token" {
				keys = append(keys, key)
			}
		}
		return false
	})
	if !slices.Contains(keys, "health_address") {
		t.Fatalf("settings in %s = %v", file, keys)
	}
	return keys
}

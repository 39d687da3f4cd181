// Policies are held to the schema of their input, and it is what policies get.

package engine

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/rego"
)

func TestPoliciesAreHeldToTheSchemaOfTheInput(t *testing.T) {
	tests := map[string]struct{ rego, want string }{
		"a typing error":     {`allow if input.attributes.request.http.metod == "GET"`, `a.rego:3:10: no call has input.attributes.request.http.metod (did you mean "method"?)`},
		"in a helper":        {"allow if f\n\nf if {\n\ttrue\n\tinput.parsed_pth[0] == \"a\"\n}", `a.rego:7:2: no call has input.parsed_pth (did you mean "parsed_path"?)`},
		"in a negation":      {`allow if not input.spiffe.sorce.id == "x"`, `no call has input.spiffe.sorce (did you mean "source"?)`},
		"in a comprehension": {`allow if count([x | x := input.grpc.servce]) == 0`, `(did you mean "service"?)`},
		"nothing like it":    {`allow if input.attributes.request.time`, `a.rego:3:10: no call has input.attributes.request.time; input.attributes.request has http`},
		"below a text":       {`allow if input.protocol.name == "a"`, `no call has input.protocol.name: input.protocol is a string`},
		"another type":       {`allow if input.protocol == 1`, "a.rego:3:10: match error"},
		"an argument":        {`allow if startswith(input.parsed_path, "/a")`, "a.rego:3:10: startswith: invalid argument(s)"},
		"an annotation": {
			"# METADATA\n# schemas:\n#   - input.jwt: {type: object, properties: {team: {type: string}}}\nallow if input.jwt.tean == \"a\"",
			`a.rego:6:10: no call has input.jwt.tean (did you mean "team"?)`,
		},
		"its types": {
			"# METADATA\n# schemas:\n#   - input.jwt: {type: object, properties: {level: {type: number}}}\nallow if input.jwt.level == \"9\"",
			"a.rego:6:10: match error",
		},
		"an unknown schema": {
			"# METADATA\n# schemas:\n#   - input: schema.inputs\nallow if input.protocol == \"tcp\"",
			"undefined schema: schema.inputs; schema.input is the one there is",
		},
		"a malformed one": {"# METADATA\n# schemas: 1\nallow if input.protocol == \"tcp\"", "a.rego:"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := CheckModules(map[string]string{"a.rego": "package authz\n\n" + tt.rego + "\n"})
			if e, ok := errors.AsType[*Error](err); !ok || !strings.Contains(err.Error(), tt.want) || e.Line == 0 {
				t.Errorf("error %v; want %q", err, tt.want)
			}
		})
	}
}

func TestPoliciesThatKeepToTheSchemaAreTaken(t *testing.T) {
	for _, rego := range []string{
		`allow if input.attributes.request.http.headers["x-any"] == "a"`, `allow if input.jwt.anything.at[0].all == 1`,
		`allow if input.parsed_query[input.attributes.request.http.host][0] == "a"`, `allow if object.get(input, "anything", 1) == 1`,
		"# METADATA\n# title: said\n# schemas:\n#   - input: schema.input\nallow if input.spiffe.source.path == \"/a\"",
		`allow if { some part, value in input.attributes; value.principal; part == "source" }`,
	} {
		if err := CheckModules(map[string]string{"a.rego": "package authz\n\n" + rego + "\n"}); err != nil {
			t.Errorf("%s: %v", rego, err)
		}
	}
}

// A policy that was taken in by an earlier version goes on deciding.
func TestLoadingDoesNotAskForTheSchema(t *testing.T) {
	load(t, nil, map[string]string{"a.rego": "package authz\n\nallow if input.nothing\n"})
}

// What calls have, the schema has, and no more: a stock OPA finds every document to
// match it.
func TestTheSchemaIsThatOfTheDocument(t *testing.T) {
	q, err := rego.New(rego.Query("json.match_schema(input, data.schema)"), rego.Data(map[string]any{"schema": fromJSON(t, InputSchema)})).PrepareForEval(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	w := &writer{Rand: rand.New(rand.NewPCG(1, 2))}
	for range 300 {
		in := w.call()
		in.DestinationAddress = "10.0.0.2:443"
		if w.IntN(3) == 0 {
			in.JWT = map[string]any{"sub": "a", "n": 1.5, "aud": []any{"a"}}
		}
		doc := document(in)
		rs, err := q.Eval(context.Background(), rego.EvalParsedInput(doc))
		if err != nil {
			t.Fatal(err)
		}
		if result := rs[0].Expressions[0].Value.([]any); result[0] != true {
			t.Fatalf("%v: %v", doc, result[1])
		}
		places(doc, "", seen)
	}
	for _, place := range schemaPlaces(fromJSON(t, InputSchema), "") {
		if !seen[place] {
			t.Errorf("the schema has %s, and no call does", place)
		}
	}
}

// places notes where v has members, up to those that a caller names.
func places(v ast.Value, at string, seen map[string]bool) {
	seen[at] = true
	if object, ok := v.(ast.Object); ok {
		object.Foreach(func(k, v *ast.Term) { places(v.Value, at+"."+string(k.Value.(ast.String)), seen) })
	}
}

func schemaPlaces(schema any, at string) []string {
	all := []string{at}
	properties, _ := schema.(map[string]any)["properties"].(map[string]any)
	for name, of := range properties {
		all = append(all, schemaPlaces(of, at+"."+name)...)
	}
	return all
}

package engine

import (
	"context"
	"errors"
	"testing"

	"merlon.dev/policy/strictyaml"
)

// A table of tests is run whole, or refused with the place that is wrong.
func FuzzGrantTests(f *testing.F) {
	for _, s := range []string{
		"- {name: a, source: \"spiffe://td/a\", destination: \"spiffe://td/b\", protocol: http, method: GET, path: /, want: deny, reason: NO_GRANT}\n- {name: b, want: allow}\n",
		"- {name: a, want: maybe}\n", "- {name: a, want: deny, reason: NOGRANT}\n", "- {want: deny}\n", "[]", "- []", "a: b", "",
	} {
		f.Add([]byte(s))
	}
	e, err := New(context.Background(), Source{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		results, err := e.RunGrantTests(t.Context(), "grants_test.yaml", data, nil)
		if err != nil {
			at, ok := errors.AsType[*strictyaml.Error](err)
			if len(results) > 0 || !ok || at.File != "grants_test.yaml" {
				t.Fatalf("%q: %d results, %v", data, len(results), err)
			}
			return
		}
		var cases []testCase
		if err := strictyaml.Decode("x", data, &cases); err != nil || len(cases) != len(results) {
			t.Fatalf("%q: %d results of %d cases, %v", data, len(results), len(cases), err)
		}
		for i, r := range results {
			// Nothing is granted.
			if r.Pass && cases[i].Want != "deny" || r.Pass != (r.Detail == "") || r.Line == 0 {
				t.Fatalf("%+v is %+v", cases[i], r)
			}
		}
	})
}

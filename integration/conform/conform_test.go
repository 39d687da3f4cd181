// The tool itself: that each case has its requirement, and what becomes of requirements
// of which half was checked.

package main

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"merlon.dev/integration/conform/jwtcase"
	"merlon.dev/integration/conform/pathcase"
	"merlon.dev/sdk/svid/forge"
)

func partsOf(id string) []part {
	for _, row := range checklist {
		if row.ID == id {
			return row.Parts
		}
	}
	return nil
}

func TestEachCaseHasItsRequirement(t *testing.T) {
	for _, c := range pathcase.All(t) {
		if !slices.Contains(partsOf(c.Requirement()), chains) {
			t.Errorf("%s is about %s, which is put to no validator of X509-SVIDs", c.ID, c.Requirement())
		}
	}
	for _, c := range jwtcase.All(forge.New(t, "example.org"), forge.New(t, "other.test")) {
		id, _, _ := strings.Cut(c.ID, "/")
		if !slices.Contains(partsOf(id), tokens) {
			t.Errorf("%s is about %s, which is put to no validator of JWT-SVIDs", c.ID, id)
		}
	}
	seen := make(map[string]bool)
	for _, row := range checklist {
		if seen[row.ID] {
			t.Errorf("%s is there twice", row.ID)
		}
		seen[row.ID] = true
		if len(row.Parts) == 0 && cannot[row.ID] == "" && incubating(row.ID) == "" {
			t.Errorf("%s is put to nobody, and no reason says why", row.ID)
		}
		if len(row.Parts) > 0 && cannot[row.ID] != "" {
			t.Errorf("%s is checked, and a reason says that it cannot be", row.ID)
		}
	}
}

// A requirement passes when each part was checked that was given.
func TestHalfCheckedIsNotPassed(t *testing.T) {
	bad := errors.New("bad")
	for name, tt := range map[string]struct {
		o      options
		checks map[part]error
		want   outcome
		why    string
	}{
		"nothing":                       {options{socket: "s"}, nil, skip, "--forge was not given"},
		"issuer without forge":          {options{socket: "s"}, map[part]error{issuer: nil}, partial, "JWT-SVID validator: --forge was not given"},
		"issuer and tokens":             {options{socket: "s", forge: "f"}, map[part]error{issuer: nil, tokens: nil}, pass, ""},
		"a server alone":                {options{server: "s", forge: "f"}, map[part]error{chains: nil}, pass, ""},
		"a server that was not asked":   {options{socket: "s", forge: "f", server: "s"}, map[part]error{issuer: nil, tokens: nil}, partial, "X509-SVID validator"},
		"one part fails":                {options{socket: "s", forge: "f"}, map[part]error{issuer: nil, tokens: bad}, fail, "bad"},
		"one part fails, one not asked": {options{socket: "s"}, map[part]error{issuer: bad}, fail, "bad"},
	} {
		r := newReport()
		for of, err := range tt.checks {
			r.check("ID1", of, err)
		}
		results := r.list(tt.o.given, tt.o.missing)
		res := results[slices.IndexFunc(results, func(r *result) bool { return r.ID == "ID1" })]
		if res.Status != tt.want || !strings.Contains(strings.Join(res.Findings, "\n"), tt.why) {
			t.Errorf("%s: %s, %q; want %s, %q", name, res.Status, res.Findings, tt.want, tt.why)
		}
		if n := mustFailures(results); (n > 0) != (tt.want == fail) {
			t.Errorf("%s: %d failures", name, n)
		}
	}
}

// Every requirement says why it was not checked, whatever was given.
func TestSkippedSaysWhy(t *testing.T) {
	for _, o := range []options{{}, {socket: "s"}, {socket: "s", forge: "f"}, {bundleURL: "u"}, {server: "s", forge: "f"}, {consumer: "c"}} {
		for _, res := range newReport().list(o.given, o.missing) {
			if res.Status != skip || len(res.Findings) == 0 || res.Findings[0] == "" {
				t.Errorf("%+v: %s: %s, %q", o, res.ID, res.Status, res.Findings)
			}
		}
	}
}

// Sequences are whole numbers of any size.
func TestFollows(t *testing.T) {
	for name, tt := range map[string]struct {
		before, after, keysBefore, keysAfter string
		ok                                   bool
	}{
		"the same":                  {"5", "5", `[]`, `[]`, true},
		"more":                      {"5", "6", `[]`, `[{"kty":"EC"}]`, true},
		"less":                      {"5", "4", `[]`, `[]`, false},
		"other keys":                {"5", "5", `[]`, `[{"kty":"EC"}]`, false},
		"less, beyond a float64":    {"9007199254740993", "9007199254740992", `[]`, `[]`, false},
		"more, beyond a float64":    {"9007199254740992", "9007199254740993", `[]`, `[{}]`, true},
		"more, beyond 64 bits":      {"18446744073709551615", "18446744073709551616", `[]`, `[{}]`, true},
		"a fraction":                {"5", "5.5", `[]`, `[{}]`, false},
		"no number":                 {"5", `"6"`, `[]`, `[{}]`, false},
		"digits longer, still less": {"100", "99", `[]`, `[]`, false},
	} {
		parse := func(sequence, keys string) *document {
			d := new(document)
			if err := json.Unmarshal([]byte(`{"spiffe_sequence":`+sequence+`,"keys":`+keys+`}`), d); err != nil {
				t.Fatal(err)
			}
			return d
		}
		if err := parse(tt.after, tt.keysAfter).follows(parse(tt.before, tt.keysBefore)); (err == nil) != tt.ok {
			t.Errorf("%s: %v; want ok = %t", name, err, tt.ok)
		}
	}
}

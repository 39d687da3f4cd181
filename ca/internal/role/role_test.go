// Prefixes end where segments do, and no role has more than it should.

package role

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestPrefixCoversWholeSegments(t *testing.T) {
	for _, test := range []struct {
		prefix, path string
		want         bool
	}{
		{"/ns/a", "/ns/a", true},
		{"/ns/a", "/ns/a/web", true},
		{"/ns/a", "/ns/a/b/c", true},
		{"/ns/a", "/ns/a-evil", false},
		{"/ns/a", "/ns/a.b", false},
		{"/ns/a", "/ns", false},
		{"/ns/a", "/ns/b/a", false},
		{"/ns/a", "/x/ns/a", false},
		{"/ns/a", "/NS/A", false},
		{"/ns/a", "", false},
		{"", "/ns/a", false}, // the zero prefix is no wildcard
	} {
		if got := (Role{Name: Registrar, Prefix: test.prefix}).Covers(test.path); got != test.want {
			t.Errorf("registrar of %q covers %q = %t; want %t", test.prefix, test.path, got, test.want)
		}
	}
	if (Role{}).Covers("/web") || (Role{}).Everywhere() {
		t.Error("no role covers something")
	}
	if !(Role{Name: Operator}).Covers("/web") {
		t.Error("an operator does not cover everything")
	}
}

var segment = rapid.StringMatching(`[a-z0-9._-]{1,3}`).Filter(func(s string) bool { return s != "." && s != ".." })

// A path is covered exactly when the segments of the prefix are its first ones.
func TestPrefixIsOfSegments(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		prefix := rapid.SliceOfN(segment, 1, 3).Draw(rt, "prefix")
		path := rapid.SliceOfN(segment, 1, 4).Draw(rt, "path")
		if rapid.Bool().Draw(rt, "below") {
			path = append(append([]string{}, prefix...), path...)
			if rapid.Bool().Draw(rt, "nearly") {
				path[len(prefix)-1] += "x"
			}
		}
		want := len(path) >= len(prefix)
		for i := range prefix {
			want = want && path[i] == prefix[i]
		}
		r := Role{Name: Registrar, Prefix: "/" + strings.Join(prefix, "/")}
		if err := r.CheckPrefix(); err != nil {
			rt.Fatal(err)
		}
		if got := r.Covers("/" + strings.Join(path, "/")); got != want {
			rt.Fatalf("%s covers %v = %t; want %t", r, path, got, want)
		}
	})
}

func TestRolesThatAreRefused(t *testing.T) {
	for name, r := range map[string]Role{
		"none":                     {},
		"unheard of":               {Name: "root"},
		"capitals":                 {Name: "Operator"},
		"registrar without prefix": {Name: Registrar},
		"registrar of everything":  {Name: Registrar, Prefix: "/"},
		"relative":                 {Name: Registrar, Prefix: "ns/a"},
		"trailing slash":           {Name: Registrar, Prefix: "/ns/a/"},
		"dots":                     {Name: Registrar, Prefix: "/ns/../a"},
		"wildcard":                 {Name: Registrar, Prefix: "/ns/*"},
		"escape":                   {Name: Registrar, Prefix: "/ns/%2e"},
		"line break":               {Name: Registrar, Prefix: "/ns\n"},
		"long":                     {Name: Registrar, Prefix: "/" + strings.Repeat("a", maxPrefixBytes)},
		"operator with prefix":     {Name: Operator, Prefix: "/ns/a"},
		"viewer with prefix":       {Name: Viewer, Prefix: "/ns/a"},
	} {
		if r.CheckName() == nil && r.CheckPrefix() == nil {
			t.Errorf("%s: %+v is taken", name, r)
		}
	}
	for _, r := range []Role{{Name: Viewer}, {Name: PolicyPublisher}, {Name: Operator}, {Name: Registrar, Prefix: "/ns/a"}} {
		if r.CheckName() != nil || r.CheckPrefix() != nil {
			t.Errorf("%s is refused: %v, %v", r, r.CheckName(), r.CheckPrefix())
		}
	}
}

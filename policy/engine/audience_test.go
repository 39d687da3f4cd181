// For whom a policy is.

package engine

import "testing"

func TestForOthers(t *testing.T) {
	for name, test := range map[string]struct {
		audience, listed []string
		want             bool
	}{
		"for the same":          {[]string{"a", "b"}, []string{"b", "a"}, false},
		"for fewer":             {[]string{"a"}, []string{"a", "b"}, false},
		"for one more":          {[]string{"a", "b"}, []string{"a"}, true},
		"for one in its place":  {[]string{"a", "b"}, []string{"a", "c"}, true},
		"for nobody else":       {[]string{"a"}, nil, true},
		"for all, by no name":   {nil, []string{"a"}, false},
		"named twice in a list": {[]string{"a", "a"}, []string{"a"}, false},
	} {
		e, err := New(t.Context(), Source{Generation: 1, Audience: test.audience})
		if err != nil {
			t.Fatal(err)
		}
		if got := e.ForOthers(test.listed); got != test.want {
			t.Errorf("%s: %t; want %t", name, got, test.want)
		}
	}
}

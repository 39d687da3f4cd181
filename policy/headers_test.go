package policy

import (
	"iter"
	"maps"
	"reflect"
	"testing"
)

// spelled are headers that are at hand in another form.
type spelled map[string]string

func (s spelled) Values(name string) ([]string, bool) {
	v, ok := s[name]
	return []string{v}, ok
}

func (s spelled) UTF8() bool { return true }

func (s spelled) All() iter.Seq2[string, []string] {
	return func(yield func(string, []string) bool) {
		for name, v := range s {
			if !yield(name, []string{v}) {
				return
			}
		}
	}
}

func TestHeadersReadTheSameInAnyForm(t *testing.T) {
	for name, tt := range map[string]struct {
		in   Headers
		want HeaderMap
	}{
		"none":         {nil, nil},
		"a nil map":    {HeaderMap(nil), nil},
		"a map":        {HeaderMap{"a": {"1", "2"}, "b": {}}, HeaderMap{"a": {"1", "2"}, "b": {}}},
		"another form": {spelled{"a": "1"}, HeaderMap{"a": {"1"}}},
	} {
		in := &Input{Headers: tt.in}
		if got := in.HeaderMap(); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %v; want %v", name, got, tt.want)
		}
		for _, header := range []string{"a", "b", "c"} {
			want, present := tt.want[header]
			if got, ok := in.Header(header); ok != present || present && !reflect.DeepEqual(got, want) {
				t.Errorf("%s: %s is %q, %v; want %q, %v", name, header, got, ok, want, present)
			}
		}
		if tt.in != nil && !maps.EqualFunc(maps.Collect(tt.in.All()), tt.want, func(a, b []string) bool { return reflect.DeepEqual(a, b) }) {
			t.Errorf("%s: all are %v", name, maps.Collect(tt.in.All()))
		}
	}
}

func TestHeadersAreUTF8(t *testing.T) {
	for name, tt := range map[string]struct {
		in   HeaderMap
		want bool
	}{
		"none":            {nil, true},
		"good":            {HeaderMap{"a": {"1", "é"}, "é": nil}, true},
		"a name is not":   {HeaderMap{"a": nil, "\xff": nil}, false},
		"a value is not":  {HeaderMap{"a": {"1", "\xff"}}, false},
		"part of a value": {HeaderMap{"a": {"caf\xe9"}}, false},
	} {
		if tt.in.UTF8() != tt.want {
			t.Errorf("%s: %v", name, !tt.want)
		}
	}
}

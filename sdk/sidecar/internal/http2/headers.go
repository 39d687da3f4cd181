// The header fields of a request as the policy sees them.

package http2

import (
	"iter"
	"maps"
	"unicode/utf8"

	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
)

// sent are the fields as they came, of which nobody makes a map before a policy reads
// them. They never change.
type sent []hpack.HeaderField

// Values implements policy.Headers.
func (s *sent) Values(name string) (values []string, ok bool) {
	for _, f := range *s {
		if f.Name == name {
			values, ok = join(values, f), true
		}
	}
	return values, ok
}

// All implements policy.Headers.
func (s *sent) All() iter.Seq2[string, []string] {
	all := make(policy.HeaderMap, len(*s))
	for _, f := range *s {
		all[f.Name] = join(all[f.Name], f)
	}
	return maps.All(all)
}

// UTF8 implements policy.Headers.
func (s *sent) UTF8() bool {
	for _, f := range *s { // names are tokens
		if !utf8.ValidString(f.Value) {
			return false
		}
	}
	return true
}

// join adds the value of f to values of its name. Cookies are one value, which HTTP/2
// lets be cut (RFC 9113 section 8.2.3).
func join(values []string, f hpack.HeaderField) []string {
	if f.Name == "cookie" && len(values) > 0 {
		values[0] += "; " + f.Value
		return values
	}
	return append(values, f.Value)
}

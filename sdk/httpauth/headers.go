// The header fields of a request, as policies and handlers see them.

package httpauth

import (
	"iter"
	"maps"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"merlon.dev/policy"
)

// withoutForgedIdentity gives r without header or trailer fields that claim an
// identity. It copies only what it changes.
func withoutForgedIdentity(r *http.Request) *http.Request {
	isForged := func(name string, _ []string) bool { return policy.ClaimsIdentity(strings.ToLower(name)) }
	for name := range r.Header {
		if policy.ClaimsIdentity(strings.ToLower(name)) {
			clean := maps.Clone(r.Header)
			maps.DeleteFunc(clean, isForged)
			copied := *r
			copied.Header = clean
			r = &copied
			break
		}
	}
	if len(r.Trailer) > 0 {
		// Their values come after the body, into this very map.
		maps.DeleteFunc(r.Trailer, isForged)
		copied := *r
		copied.Body = &trailerFilter{ReadCloser: r.Body, trailer: r.Trailer, drop: isForged}
		r = &copied
	}
	return r
}

// fields are header fields as they came. A handler may change its request's, while
// the policy still has to see these, so they are a copy; that of a slice costs a
// fraction of a map's with other names, which is made when a policy reads them.
type fields []field

type field struct {
	name   string // as http.Header has it
	values []string
}

// sent copies the fields of a request.
func sent(header http.Header) *fields {
	all, values := make(fields, 0, len(header)), make([]string, 0, len(header)+4)
	for name, v := range header {
		begin := len(values)
		values = append(values, v...)
		all = append(all, field{name, values[begin:len(values):len(values)]})
	}
	return &all
}

// Values implements policy.Headers.
func (f *fields) Values(name string) (values []string, ok bool) {
	for _, field := range *f {
		if !lowers(field.name, name) {
			continue
		}
		if !ok {
			values, ok = field.values, true
			continue
		}
		values = slices.Concat(values, field.values) // names that differ in case
	}
	return values, ok
}

// lowers says whether strings.ToLower of name is lower, and does not make it.
func lowers(name, lower string) bool {
	for i := range len(name) {
		c := name[i]
		if c >= utf8.RuneSelf { // of which one bears an ASCII letter
			return strings.ToLower(name) == lower
		}
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if i == len(lower) || c != lower[i] {
			return false
		}
	}
	return len(name) == len(lower)
}

// UTF8 implements policy.Headers.
func (f *fields) UTF8() bool {
	for _, field := range *f {
		if !utf8.ValidString(field.name) || !policy.AllUTF8(field.values) {
			return false
		}
	}
	return true
}

// All implements policy.Headers.
func (f *fields) All() iter.Seq2[string, []string] {
	if !f.canonical() { // some may differ in case alone
		all := make(map[string][]string, len(*f))
		for _, field := range *f {
			name := strings.ToLower(field.name)
			all[name] = append(all[name], field.values...)
		}
		return maps.All(all)
	}
	return func(yield func(string, []string) bool) {
		names := f.lower()
		for _, field := range *f {
			name := names[:len(field.name)]
			names = names[len(field.name):]
			if !yield(name, field.values) {
				return
			}
		}
	}
}

// canonical says whether all names are as net/http writes those of a request: ASCII,
// with upper case where a word begins and nowhere else.
func (f *fields) canonical() bool {
	for _, field := range *f {
		begins := true
		for i := range len(field.name) {
			c := field.name[i]
			if c >= utf8.RuneSelf || begins && 'a' <= c && c <= 'z' || !begins && 'A' <= c && c <= 'Z' {
				return false
			}
			begins = c == '-'
		}
	}
	return true
}

// lower is all names in lower case, one after the other: one piece of memory for all.
func (f *fields) lower() string {
	size := 0
	for _, field := range *f {
		size += len(field.name)
	}
	var b strings.Builder
	b.Grow(size)
	for _, field := range *f {
		for i := range len(field.name) {
			c := field.name[i]
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			b.WriteByte(c)
		}
	}
	return b.String()
}

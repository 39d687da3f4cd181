// The header fields of a call, as far as somebody reads them. Most policies read
// none, and a call that nobody reads should not pay for having its fields copied
// and renamed: whoever enforces hands over what it has.

package policy

import (
	"iter"
	"maps"
	"unicode/utf8"
)

// Headers are the header fields of a call as policies see them: names in lower
// case, each once, and every value. They never change, and are safe for
// concurrent use: a call that lasts is decided again while it is served.
type Headers interface {
	// Values are those of the field called name, which is in lower case; false if
	// the call has no such field. The slice is shared.
	Values(name string) ([]string, bool)
	// All are the fields, in no order. The slices are shared.
	All() iter.Seq2[string, []string]
	// UTF8 says whether all names and values are UTF-8. Calls that have others are
	// refused, so it is asked for every call.
	UTF8() bool
}

// HeaderMap are Headers that are at hand.
type HeaderMap map[string][]string

// Values implements Headers.
func (h HeaderMap) Values(name string) ([]string, bool) {
	values, ok := h[name]
	return values, ok
}

// All implements Headers.
func (h HeaderMap) All() iter.Seq2[string, []string] { return maps.All(h) }

// UTF8 implements Headers.
func (h HeaderMap) UTF8() bool {
	for name, values := range h {
		if !utf8.ValidString(name) || !AllUTF8(values) {
			return false
		}
	}
	return true
}

// AllUTF8 says whether all values are UTF-8.
func AllUTF8(values []string) bool {
	for _, v := range values {
		if !utf8.ValidString(v) {
			return false
		}
	}
	return true
}

// Header gives the values of one header field of the call, and whether it has it.
// name is in lower case.
func (in *Input) Header(name string) ([]string, bool) {
	if in.Headers == nil {
		return nil, false
	}
	return in.Headers.Values(name)
}

// HeaderMap gives all header fields of the call; nil for none. It is shared, and
// must not be changed.
func (in *Input) HeaderMap() HeaderMap {
	switch h := in.Headers.(type) {
	case nil:
		return nil
	case HeaderMap:
		return h
	default:
		return maps.Collect(h.All())
	}
}

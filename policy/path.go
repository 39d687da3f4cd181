package policy

// This file decides which paths are ambiguous. Servers decode and clean a
// path after the decision about it (attack T14): "/public/%2e%2e/admin" is
// one thing to a policy and another to a file server. Such paths are refused
// before any policy is asked, and never cleaned, because the policy must see
// the very bytes that are served.

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// PathError says why a path is ambiguous.
type PathError struct {
	Path   string
	Offset int // of the offending byte
	Reason string
}

// Error quotes the path, so that control characters cannot forge log lines.
func (e *PathError) Error() string {
	return fmt.Sprintf("path %.200q is ambiguous: %s at byte %d", e.Path, e.Reason, e.Offset)
}

// CheckPath returns a *PathError unless path means the same to every server:
// it starts with "/"; no segment but the last is empty and none is "." or
// ".."; it has no "\", ";", "#", "?" and no control character, raw or encoded;
// every "%" begins two hex digits, and what they encode is neither "/", "\",
// "%" nor an unreserved character (RFC 3986 section 2.3, for which there is
// no reason but to hide it); it is UTF-8 before and after decoding.
//
// path is a path alone, without query. CheckPath neither allocates nor
// changes anything when the path is fine.
func CheckPath(path string) error {
	if path == "" || path[0] != '/' {
		return &PathError{Path: path, Reason: `does not start with "/"`}
	}
	ascii, start := true, 1 // start of the current segment
	for i := 1; i < len(path); i++ {
		switch c := path[i]; {
		case plain[c]:
		case c == '/':
			if i-start <= len("..") {
				if reason := checkSegment(path[start:i], false); reason != "" {
					return &PathError{Path: path, Offset: start, Reason: reason}
				}
			}
			start = i + 1
		case c == '%':
			decoded, reason := decodeByte(path[i:])
			if reason != "" {
				return &PathError{Path: path, Offset: i, Reason: reason}
			}
			ascii = ascii && decoded < utf8.RuneSelf
		case c >= utf8.RuneSelf:
			ascii = false
		default:
			if reason := checkRaw(c); reason != "" {
				return &PathError{Path: path, Offset: i, Reason: reason}
			}
		}
	}
	if reason := checkSegment(path[start:], true); reason != "" {
		return &PathError{Path: path, Offset: start, Reason: reason}
	}
	if !ascii {
		return checkUTF8(path)
	}
	return nil
}

// plain are the bytes that nothing is to be looked at for: all but "/", "%", what
// checkRaw refuses and what is not ASCII.
var plain = func() (table [256]bool) {
	for c := range byte(utf8.RuneSelf) {
		table[c] = c != '/' && c != '%' && checkRaw(c) == ""
	}
	return table
}()

// DecodePath gives path, which has passed CheckPath, as a server decodes it:
// "/caf%C3%A9" and "/caf%c3%a9" are "/café", and "/a%3Ab" is "/a:b". Grants
// compare paths in this form; else a deny could be walked around by encoding
// a character that it names.
func DecodePath(path string) string {
	if strings.IndexByte(path, '%') < 0 {
		return path
	}
	return string(decode(path))
}

// SplitRPC splits the path of a gRPC call, "/package.Service/Method".
func SplitRPC(path string) (service, method string, ok bool) {
	if path == "" || path[0] != '/' {
		return "", "", false
	}
	service, method, ok = strings.Cut(path[1:], "/")
	if !ok || service == "" || method == "" || strings.IndexByte(method, '/') >= 0 {
		return "", "", false
	}
	return service, method, true
}

// decode leaves alone what is no percent-encoding.
func decode(path string) []byte {
	decoded := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' && i+2 < len(path) {
			high, ok1 := unhex(path[i+1])
			low, ok2 := unhex(path[i+2])
			if ok1 && ok2 {
				c = high<<4 | low
				i += 2
			}
		}
		decoded = append(decoded, c)
	}
	return decoded
}

func checkSegment(s string, last bool) string {
	switch {
	case s == "" && !last:
		return `empty segment ("//")`
	case s == "." || s == "..":
		return fmt.Sprintf("segment %q", s)
	}
	return ""
}

func checkRaw(c byte) string {
	switch {
	case c == '\\', c == ';', c == '#', c == '?':
		return fmt.Sprintf("character %q", c)
	case c < ' ', c == 0x7f:
		return "control character"
	}
	return ""
}

// decodeByte decodes the percent-encoding that s begins with, and says what
// is wrong with it.
func decodeByte(s string) (byte, string) {
	if len(s) < 3 {
		return 0, "incomplete percent-encoding"
	}
	high, ok1 := unhex(s[1])
	low, ok2 := unhex(s[2])
	if !ok1 || !ok2 {
		return 0, "percent-encoding without two hex digits"
	}
	c := high<<4 | low
	switch {
	case c == '/', c == '\\', c == '%':
		return c, fmt.Sprintf("encoded %q", c)
	case c < ' ', c == 0x7f:
		return c, "encoded control character"
	case unreserved(c):
		return c, fmt.Sprintf("encoded %q, which needs no encoding", c)
	}
	return c, ""
}

func unhex(c byte) (byte, bool) {
	switch {
	case '0' <= c && c <= '9':
		return c - '0', true
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10, true
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// unreserved is the set of RFC 3986 section 2.3.
func unreserved(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	}
	return c == '-' || c == '.' || c == '_' || c == '~'
}

// checkUTF8 refuses what some decoder would repair: bytes that are no UTF-8
// (an overlong %c0%af is a "/" to a sloppy one) and the control characters
// U+0080 to U+009F. The escapes of path have been checked.
func checkUTF8(path string) error {
	if !utf8.ValidString(path) {
		return &PathError{Path: path, Reason: "bad UTF-8"}
	}
	decoded := decode(path)
	for i := 0; i < len(decoded); {
		r, n := utf8.DecodeRune(decoded[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			return &PathError{Path: path, Reason: "bad UTF-8 in percent-encoding"}
		case unicode.IsControl(r):
			return &PathError{Path: path, Reason: "control character"}
		}
		i += n
	}
	return nil
}

// What a line of JSON may hold: nothing that a terminal or an editor obeys.

package decisionlog

import (
	"fmt"
	"unicode/utf8"
)

// Printable escapes in a line of JSON what encoding/json leaves as it is: DEL, the C1
// controls (U+009B begins a terminal sequence as ESC does), marks that turn the
// direction of text or take no space, and bytes that are no UTF-8. The line says the
// same afterwards.
func Printable(line []byte) []byte {
	out, kept := []byte(nil), 0
	for i := 0; i < len(line); {
		if line[i] < 0x7f {
			i++
			continue
		}
		r, n := utf8.DecodeRune(line[i:])
		if obeyed(r) || r == utf8.RuneError && n == 1 {
			out = fmt.Appendf(append(out, line[kept:i]...), `\u%04x`, r)
			kept = i + n
		}
		i += n
	}
	if out == nil {
		return line
	}
	return append(out, line[kept:]...)
}

func obeyed(r rune) bool {
	return r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0xfeff
}

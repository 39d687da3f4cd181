package decisionlog

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
	"unicode"
	"unicode/utf8"
)

// What was JSON says the same, and nothing in it moves a cursor.
func FuzzPrintable(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":"b"}`, "{\"\u009b31m\":\"\u202ex\u2028\u200b\ufeff\x7f\"}", "{\"a\":\"\xff\x9b\"}", "\"é😀\"", "\x9b"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		before := bytes.Clone(line)
		got := Printable(line)
		if !bytes.Equal(line, before) {
			t.Fatalf("%q was changed to %q", before, line)
		}
		if !utf8.Valid(got) || bytes.ContainsFunc(got, func(r rune) bool { return obeyed(r) || r > 0x7e && unicode.IsControl(r) }) {
			t.Fatalf("Printable(%q) = %q", line, got)
		}
		var want, have any
		if json.Unmarshal(line, &want) != nil {
			return
		}
		if err := json.Unmarshal(got, &have); err != nil || !reflect.DeepEqual(have, want) {
			t.Fatalf("Printable(%q) = %q says %v, %v; want %v", line, got, have, err, want)
		}
	})
}

// Package spire says what SPIRE's registration entries and configuration files
// are here, and names all of theirs that is nothing here. It is pure: it reads
// bytes, and neither asks nor changes a CA.
//
// What would widen who gets an identity is not translated in part: an entry of
// which one selector has no equivalent is left out whole.
package spire

import (
	"fmt"
	"strings"
)

// MaxBytes is the longest file that is read: some 250 000 entries.
const MaxBytes = 256 << 20

// Remark names something of SPIRE's that is nothing here, or not quite the same.
type Remark struct {
	File string `json:"file"`
	Line int    `json:"line,omitempty"`
	// Of is a setting, such as server.ca_subject, or an entry.
	Of   string `json:"of"`
	Text string `json:"text"`
	// Missing: nothing here does this, and it was left out. Otherwise it was
	// translated, with what the text says.
	Missing bool `json:"missing"`
}

// String is the remark as one line.
func (r Remark) String() string {
	where := r.File
	if r.Line > 0 {
		where = fmt.Sprintf("%s:%d", r.File, r.Line)
	}
	kind := "note"
	if r.Missing {
		kind = "no equivalent"
	}
	return printable(fmt.Sprintf("%s: %s: %s: %s", where, kind, r.Of, r.Text))
}

// remarks collects them for one file.
type remarks struct {
	file string
	list []Remark
}

func (r *remarks) note(line int, of, format string, args ...any) {
	r.list = append(r.list, Remark{r.file, line, of, fmt.Sprintf(format, args...), false})
}

func (r *remarks) missing(line int, of, format string, args ...any) {
	r.list = append(r.list, Remark{r.file, line, of, fmt.Sprintf(format, args...), true})
}

// printable keeps a foreign file from writing lines, or to the terminal, itself.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0x2028 || r == 0x2029 {
			return '?'
		}
		return r
	}, s)
}

// Word is a as one word of a shell's command: quoted, where a shell would not take it as
// it is.
func Word(a string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=@,+"
	if a != "" && strings.Trim(a, plain) == "" {
		return a
	}
	return "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
}

// Package strictyaml decodes the YAML that people write for Merlon (grants,
// config files) and refuses whatever a reader could misunderstand: unknown
// and duplicate keys, values of another type, empty values, second documents,
// anchors, aliases, merge keys and tags. Each refusal names file, line and
// column and, for a misspelt key, the key that was probably meant.
package strictyaml

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// MaxBytes is the longest document that Decode reads; ten thousand grants fit.
const MaxBytes = 4 << 20

// maxDepth bounds nesting before the parser, which recurses, sees the bytes:
// a megabyte of "[" would exhaust the stack, which no recover can catch.
const maxDepth = 32

// Error is a refused document. Its text is
// "file:line:column: field: reason (did you mean "x"?)".
type Error struct {
	File         string
	Line, Column int    // from 1; 0 where the document as a whole is meant
	Field        string // path of the field, e.g. "grants[0].http.paths"; may be empty
	Reason       string
	Suggestion   string // the key or value that was probably meant; may be empty
}

// Error says where and why the document was refused.
func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s = fmt.Sprintf("%s:%d:%d", e.File, e.Line, e.Column)
	}
	if e.Field != "" {
		s += ": " + e.Field
	}
	s += ": " + e.Reason
	if e.Suggestion != "" {
		s += fmt.Sprintf(" (did you mean %q?)", e.Suggestion)
	}
	return s
}

// Decode reads the one YAML document in data into the struct, or for a list
// the slice, that into points to. name is the file's name for errors, which are of type *Error.
//
// Keys are the names in `yaml:"name"` tags (the lower-case field name without
// one; "-" hides a field). Fields may be strings, booleans, numbers,
// time.Duration ("1h"), encoding.TextUnmarshaler (so time.Time in RFC 3339),
// structs, slices, maps with string keys and pointers to these. A slice that is
// a TextUnmarshaler may be written as text or as a list. A field of type
// Position is no key: it receives the place of its struct. An empty document
// leaves into as it is, which lets the caller keep defaults. On error into may be partly written.
func Decode(name string, data []byte, into any) error {
	root, err := parse(name, data)
	if err != nil || root == nil {
		return err
	}
	d := decoder{file: name}
	return d.decodeRoot(root, into)
}

// ReadFile reads a file for Decode: at most one byte more than Decode takes,
// which then says so, however much there is.
func ReadFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, MaxBytes+1))
}

func parse(name string, data []byte) (ast.Node, error) {
	whole := func(format string, args ...any) error {
		return &Error{File: name, Reason: fmt.Sprintf(format, args...)}
	}
	if len(data) > MaxBytes {
		return nil, whole("is longer than %d bytes", MaxBytes)
	}
	if !utf8.Valid(data) {
		return nil, whole("is not valid UTF-8")
	}
	tokens := lexer.Tokenize(string(data))
	if err := checkDepth(name, tokens); err != nil {
		return nil, err
	}
	file, err := parser.Parse(tokens, 0)
	if err != nil {
		return nil, syntaxError(name, err)
	}
	var root ast.Node
	for i, doc := range file.Docs {
		if i > 0 {
			return nil, at(name, doc.Start, "", "only one document is read; remove what follows \"---\"")
		}
		root = doc.Body
	}
	if _, comment := root.(*ast.CommentGroupNode); comment {
		return nil, nil
	}
	return root, nil
}

// checkDepth counts open flow brackets, and block entries begun on one line.
// Block nesting by indentation needs a line per level that is longer than the
// one before, so MaxBytes bounds it at about 2900 levels.
func checkDepth(name string, tokens token.Tokens) error {
	flow, line, entries := 0, 0, 0
	for _, t := range tokens {
		if t.Position.Line != line {
			line, entries = t.Position.Line, 0
		}
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow = max(flow-1, 0)
		case token.SequenceEntryType, token.MappingKeyType, token.TagType, token.AnchorType:
			entries++
		}
		if flow > maxDepth || entries > maxDepth {
			return at(name, t, "", fmt.Sprintf("is nested deeper than %d levels", maxDepth))
		}
		if t.Position.IndentNum > 4*maxDepth {
			return at(name, t, "", fmt.Sprintf("is indented by more than %d columns", 4*maxDepth))
		}
	}
	return nil
}

func syntaxError(name string, err error) error {
	var e yaml.Error
	if errors.As(err, &e) && e.GetToken() != nil {
		return at(name, e.GetToken(), "", e.GetMessage())
	}
	return &Error{File: name, Reason: err.Error()}
}

func at(name string, t *token.Token, field, reason string) *Error {
	e := &Error{File: name, Field: field, Reason: reason}
	if t != nil && t.Position != nil {
		e.Line, e.Column = t.Position.Line, t.Position.Column
	}
	return e
}

// What YAML is refused, where, and with which suggestion.

package strictyaml

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

type inner struct {
	Methods []string `yaml:"methods"`
	Paths   []string `yaml:"paths"`
}

// words are written as text, or as a list.
type words []string

func (w *words) UnmarshalText(text []byte) error {
	*w = strings.Fields(string(text))
	return nil
}

type document struct {
	TrustDomain string            `yaml:"trust_domain"`
	TTL         time.Duration     `yaml:"ttl"`
	Workers     int               `yaml:"workers"`
	Small       uint8             `yaml:"small"`
	Ratio       float64           `yaml:"ratio"`
	Development bool              `yaml:"development"`
	Expires     *time.Time        `yaml:"expires"`
	Labels      map[string]string `yaml:"labels"`
	HTTP        *inner            `yaml:"http"`
	List        []inner           `yaml:"list"`
	Words       words             `yaml:"words"`
	Hidden      string            `yaml:"-"`
	Plain       string
	Where       Position
}

func TestDecodeReadsEveryKindOfField(t *testing.T) {
	var got document
	err := Decode("ca.yaml", []byte(`---
# a comment
trust_domain: shop.test
ttl: 1h30m
workers: 4
small: 255
ratio: 1
development: true
expires: 2027-01-01T00:00:00Z
labels:
  a: "1"
  b: |
    two
http:
  methods: [GET]
  paths:
    - /a
list:
  - methods: ["POST"]
plain: x
`), &got)
	if err != nil {
		t.Fatal(err)
	}
	expires := time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)
	want := document{
		TrustDomain: "shop.test", TTL: 90 * time.Minute, Workers: 4, Small: 255, Ratio: 1, Development: true,
		Expires: &expires, Labels: map[string]string{"a": "1", "b": "two\n"},
		HTTP: &inner{Methods: []string{"GET"}, Paths: []string{"/a"}}, List: []inner{{Methods: []string{"POST"}}}, Plain: "x",
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(document{}, "Where")); diff != "" {
		t.Error(diff)
	}
	if p := got.Where.Of("ttl"); p.Line != 4 || p.Column != 1 {
		t.Errorf("position of ttl = %d:%d; want 4:1", p.Line, p.Column)
	}
	if p := got.Where.Of("absent"); p.Line != 3 {
		t.Errorf("position of an absent key = line %d; want that of the struct, 3", p.Line)
	}
}

func TestTextOrList(t *testing.T) {
	for doc, want := range map[string]words{
		"words: a":      {"a"},
		"words: a b":    {"a", "b"},
		"words: [a, b]": {"a", "b"},
		"words: [a b]":  {"a b"},
		"words: []":     {},
	} {
		var got document
		if err := Decode("c.yaml", []byte(doc), &got); err != nil || !cmp.Equal(got.Words, want) {
			t.Errorf("Decode(%q) = %q, %v; want %q", doc, got.Words, err, want)
		}
	}
}

func TestDecodeLeavesDefaultsWhereTheDocumentIsEmpty(t *testing.T) {
	for _, doc := range []string{"", "\n", "# only a comment\n", "---\n"} {
		got := document{Workers: 7}
		if err := Decode("x.yaml", []byte(doc), &got); err != nil || got.Workers != 7 {
			t.Errorf("Decode(%q) = %v, workers %d; want nil, 7", doc, err, got.Workers)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	tests := map[string]struct{ doc, want string }{
		"unknown key":           {"trust_domian: x", `c.yaml:1:1: unknown key "trust_domian" (did you mean "trust_domain"?)`},
		"unknown nested key":    {"workers: 1\nhttp:\n  method: [GET]", `c.yaml:3:3: http: unknown key "method" (did you mean "methods"?)`},
		"unknown and far":       {"zebra: 1", `c.yaml:1:1: unknown key "zebra"`},
		"hidden field":          {"Hidden: x", `unknown key "Hidden"`},
		"position is no key":    {"where: x", `unknown key "where"`},
		"duplicate key":         {"workers: 1\nworkers: 2", `c.yaml:2:1`},
		"number for string":     {"trust_domain: 10", `c.yaml:1:15: trust_domain: must be a string, is the number 10`},
		"boolean for string":    {"trust_domain: true", `put it in quotes`},
		"string for number":     {`workers: "4"`, `workers: must be a whole number, is a string`},
		"string for boolean":    {"development: yes", `must be true or false`},
		"overflow":              {"small: 256", `256 is out of range`},
		"negative for unsigned": {"small: -1", `-1 is out of range`},
		"list for string":       {"trust_domain: [a]", `must be a string, is a list`},
		"string for list":       {"http: {methods: GET}", `http.methods: must be a list, is a string`},
		"number among texts":    {"words: [a, 5]", `words[1]: must be a string`},
		"element type":          {"http: {methods: [GET, 5]}", `http.methods[1]: must be a string`},
		"scalar for mapping":    {"http: GET", `must be a mapping`},
		"number for duration":   {"ttl: 60", `ttl: must be a duration such as "1h"`},
		"bad duration":          {"ttl: 1 hour", `"1 hour" is not a duration`},
		"bad time":              {"expires: tomorrow", `"tomorrow" is not a time such as`},
		"empty value":           {"trust_domain:\nworkers: 1", `trust_domain: has no value`},
		"null":                  {"http: null", `http: has no value`},
		"two documents":         {"workers: 1\n---\nworkers: 2", `only one document`},
		"anchor":                {"labels: &a {x: y}", `anchors, aliases and merge keys`},
		"merge key":             {"<<: {workers: 1}", `c.yaml:1:1`},
		"tag":                   {"trust_domain: !!str 5", `tags are not supported`},
		"root is a list":        {"- a", `must be a mapping`},
		"root is a string":      {"hello", `must be a mapping`},
		"number as key":         {"labels: {1: a}", `must be a plain string`},
		"syntax":                {"http: [", `c.yaml:1`},
		"bad UTF-8":             {"plain: \xff", `not valid UTF-8`},
		"too long":              {strings.Repeat("#", MaxBytes+1), `longer than`},
		"deep flow":             {"plain: " + strings.Repeat("[", 100000), `nested deeper than 32`},
		"deep entries":          {strings.Repeat("- ", 100000) + "a", `nested deeper than 32`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := Decode("c.yaml", []byte(tt.doc), new(document))
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Fatalf("Decode(%.40q) = %v; want *Error", tt.doc, err)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q\ndoes not contain %q", err, tt.want)
			}
		})
	}
}

func TestSuggestKeepsToNearWords(t *testing.T) {
	known := []string{"methods", "paths", "id", "to"}
	for word, want := range map[string]string{
		"method": "methods", "pahts": "paths", "ids": "id", "form": "", "x": "", "": "", "METHODS": "",
	} {
		if got := Suggest(word, known); got != want {
			t.Errorf("Suggest(%q) = %q; want %q", word, got, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range []string{"trust_domain: x\nttl: 1h", "list: [{methods: [GET]}]", "a: &b [*b]", "? a\n: b", "- - - a", "x: |\n  y\n", "\t", "'"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		err := Decode("f.yaml", data, new(document))
		if err == nil {
			return
		}
		if _, ok := errors.AsType[*Error](err); !ok {
			t.Errorf("Decode(%q) = %T; want *Error", data, err)
		}
	})
}

// A config that is named by mistake may be endless.
func TestReadFileStopsWhereDecodeRefuses(t *testing.T) {
	data, err := ReadFile("/dev/zero")
	if err != nil || len(data) != MaxBytes+1 {
		t.Fatalf("ReadFile(/dev/zero) = %d bytes, %v; want %d", len(data), err, MaxBytes+1)
	}
	if err := Decode("zero", data, &struct{}{}); err == nil || !strings.Contains(err.Error(), "is longer than") {
		t.Errorf("Decode = %v; want a refusal of the length", err)
	}
}

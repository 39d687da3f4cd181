// Package grant is the declarative half of a policy: grants, which say that
// sources may (or may not) call destinations. It reads and checks the YAML
// that people write, compiles grants into the data that a policy bundle
// carries, and matches calls against grants in plain Go. It names no OPA.
package grant

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"merlon.dev/policy"
	"merlon.dev/policy/strictyaml"
)

// Grant is one entry of a grants file. A nil list means any; Parse and Check
// refuse empty lists. Exactly one of HTTP, GRPC and TCP is set.
type Grant struct {
	// ID is unique over all files of a policy and shown in decisions.
	ID string `yaml:"id"`
	// From and To are patterns for SPIFFE IDs: an exact ID, "spiffe://td/ns/x/*"
	// (one or more whole segments below) or "spiffe://td" (the trust domain).
	From []string `yaml:"from"`
	To   []string `yaml:"to"`
	HTTP *HTTP    `yaml:"http"`
	GRPC *GRPC    `yaml:"grpc"`
	TCP  *TCP     `yaml:"tcp"`
	// Effect is Allow where empty; Deny wins over every Allow.
	Effect Effect `yaml:"effect"`
	// Mode is Enforce where empty; DryRun is recorded and decides nothing.
	Mode  Mode   `yaml:"mode"`
	Owner string `yaml:"owner"`
	// Expires ends the grant, checked at each call; nil means never.
	Expires *time.Time `yaml:"expires"`

	// File and Where say where the grant was written; zero when it was not
	// read from a file.
	File  string `yaml:"-"`
	Where strictyaml.Position
}

// HTTP grants match calls whose protocol is policy.HTTP.
type HTTP struct {
	// Methods are compared case-sensitively.
	Methods []string `yaml:"methods"`
	// Paths are exact, or end in "/*" (one or more segments), or have "{x}"
	// for a segment (any one that is not empty). What is percent-encoded is
	// compared decoded, as servers do.
	Paths []string `yaml:"paths"`
	Where strictyaml.Position
}

// GRPC grants match calls whose protocol is policy.GRPC, by the two halves of
// the path "/package.Service/Method".
type GRPC struct {
	Services []string `yaml:"services"`
	Methods  []string `yaml:"methods"`
	Where    strictyaml.Position
}

// TCP grants match connections without a known protocol.
type TCP struct {
	Where strictyaml.Position
}

// Effect says what a matching grant does.
type Effect string

// The effects.
const (
	Allow Effect = "allow"
	Deny  Effect = "deny"
)

// Mode says whether a matching grant decides.
type Mode string

// The modes.
const (
	Enforce Mode = "enforce"
	DryRun  Mode = "dry-run"
)

// Protocol is the one protocol that g matches.
func (g *Grant) Protocol() policy.Protocol {
	switch {
	case g.HTTP != nil:
		return policy.HTTP
	case g.GRPC != nil:
		return policy.GRPC
	case g.TCP != nil:
		return policy.TCP
	}
	return ""
}

// Expired reports whether g has ended at now.
func (g *Grant) Expired(now time.Time) bool {
	return g.Expires != nil && !now.Before(*g.Expires)
}

// methods and paths are what g asks of a call beyond source and destination;
// for gRPC a "path" is a service.
func (g *Grant) methods() []string {
	switch {
	case g.HTTP != nil:
		return g.HTTP.Methods
	case g.GRPC != nil:
		return g.GRPC.Methods
	}
	return nil
}

func (g *Grant) paths() []string {
	switch {
	case g.HTTP != nil:
		return g.HTTP.Paths
	case g.GRPC != nil:
		return g.GRPC.Services
	}
	return nil
}

// File is one grants file.
type File struct {
	Name string
	Data []byte
}

type document struct {
	Grants []Grant `yaml:"grants"`
	Where  strictyaml.Position
}

// Parse reads and checks the grants of all files of one policy. The result is
// sorted by ID. Errors are of type *strictyaml.Error and name file, line,
// field and reason.
func Parse(files []File) ([]Grant, error) {
	var all []Grant
	for _, f := range files {
		var doc document
		if err := strictyaml.Decode(f.Name, f.Data, &doc); err != nil {
			return nil, err
		}
		if _, present := doc.Where.Keys["grants"]; !present {
			return nil, &strictyaml.Error{File: f.Name, Reason: `has no top-level key "grants"`}
		}
		for i := range doc.Grants {
			doc.Grants[i].File = f.Name
		}
		all = append(all, doc.Grants...)
	}
	if err := Check(all); err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b Grant) int { return cmp.Compare(a.ID, b.ID) })
	return all, nil
}

// fail is an error about field key of g, placed where the key is written.
func (g *Grant) fail(where strictyaml.Position, key, field, suggestion, format string, args ...any) error {
	p := where.Of(key)
	name := "grant"
	if g.ID != "" {
		name = fmt.Sprintf("grant %q", g.ID)
	}
	return &strictyaml.Error{
		File: g.File, Line: p.Line, Column: p.Column,
		Field: name + "." + field, Reason: fmt.Sprintf(format, args...), Suggestion: suggestion,
	}
}

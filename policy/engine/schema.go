package engine

// This file holds a policy's own Rego to the types of its input: to read what no call
// has is a mistake that would only show as a call that is never allowed, or always. It
// happens where a policy is built and where the CA takes it in, not where it is
// loaded: what was accepted once goes on deciding.

import (
	_ "embed" // the schema
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy/strictyaml"
)

// InputSchema is the JSON schema of the input that policies get. Annotations call it
// schema.input; it holds for every rule that has no annotation of its own.
//
//go:embed input.schema.json
var InputSchema []byte

var schemas = sync.OnceValues(func() (*ast.SchemaSet, error) {
	var schema any
	if err := json.Unmarshal(InputSchema, &schema); err != nil {
		return nil, fmt.Errorf("schema of the input: %v", err)
	}
	set := ast.NewSchemaSet()
	set.Put(ast.SchemaRootRef, schema)
	set.Put(ast.MustParseRef("schema.input"), schema)
	return set, nil
})

// checkTypes holds modules to the schema of the input, and to those that their
// annotations name or write out.
func checkTypes(modules map[string]string) error {
	set, err := schemas()
	if err != nil {
		return err
	}
	own := maps.Clone(modules)
	delete(own, ModuleName) // it has an input of its own beside
	parsed := make(map[string]*ast.Module, len(own))
	for name, source := range own {
		if parsed[name], err = parseModule(name, source); err != nil {
			return err
		}
	}
	c := ast.NewCompiler().WithCapabilities(Capabilities()).WithSchemas(set).WithUseTypeCheckAnnotations(true)
	if c.Compile(parsed); !c.Failed() {
		return nil
	}
	first := firstError(c.Errors)
	e, ok := first.(*Error) //nolint:errorlint // it is made here
	if !ok {
		return first
	}
	e.explainRef(c.Errors)
	if strings.HasPrefix(e.Reason, "undefined schema: ") {
		e.Reason += "; schema.input is the one there is, others are written out in the annotation"
	}
	return e
}

// explainRef says of a reference into the input what is there in its place.
func (e *Error) explainRef(all ast.Errors) {
	i := slices.IndexFunc(all, func(x *ast.Error) bool {
		return x.Location != nil && x.Location.File == e.File && x.Location.Row == e.Line && x.Location.Col == e.Column
	})
	if i < 0 {
		return
	}
	switch d := all[i].Details.(type) {
	case *ast.RefErrInvalidDetail:
		if !d.Ref.HasPrefix(ast.InputRootRef) {
			return
		}
		var known []string
		for _, v := range d.OneOf {
			if s, ok := v.(ast.String); ok {
				known = append(known, string(s))
			}
		}
		e.Reason = fmt.Sprintf("no call has %s", d.Ref[:d.Pos+1])
		word, _ := d.Ref[d.Pos].Value.(ast.String)
		if near := strictyaml.Suggest(string(word), known); near != "" {
			e.Reason += fmt.Sprintf(" (did you mean %q?)", near)
		} else if len(known) > 0 {
			e.Reason += fmt.Sprintf("; %s has %s", d.Ref[:d.Pos], strings.Join(known, ", "))
		}
	case *ast.RefErrUnsupportedDetail:
		if d.Ref.HasPrefix(ast.InputRootRef) {
			e.Reason = fmt.Sprintf("no call has %s: %s is a %v", d.Ref, d.Ref[:d.Pos+1], d.Have)
		}
	}
}

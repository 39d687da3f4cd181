package strictyaml

// This file fills Go values from the syntax tree. It converts nothing: a
// number where a string is wanted is an error, because the writer of `id: 010`
// and its reader would disagree about what it says.

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/token"
)

// Position is where a struct begins in its file. A struct field of this type
// is filled by Decode and is no key.
type Position struct {
	Line, Column int
	// Keys has the places of the struct's keys, by name as written.
	Keys map[string]Position
}

// Of is the place of key, or of the struct itself where the key is absent.
func (p Position) Of(key string) Position {
	if k, ok := p.Keys[key]; ok {
		return k
	}
	return p
}

// Has reports whether key was written.
func (p Position) Has(key string) bool {
	_, ok := p.Keys[key]
	return ok
}

var (
	durationType    = reflect.TypeFor[time.Duration]()
	positionType    = reflect.TypeFor[Position]()
	unmarshalerType = reflect.TypeFor[encoding.TextUnmarshaler]()
)

type decoder struct{ file string }

func (d *decoder) decodeRoot(n ast.Node, into any) error {
	v := reflect.ValueOf(into)
	if v.Kind() != reflect.Pointer || v.IsNil() || v.Elem().Kind() != reflect.Struct && v.Elem().Kind() != reflect.Slice {
		panic("strictyaml: Decode needs a pointer to a struct or slice")
	}
	return d.decode(n, v.Elem(), "")
}

func (d *decoder) fail(n ast.Node, field, format string, args ...any) *Error {
	return at(d.file, n.GetToken(), field, fmt.Sprintf(format, args...))
}

func (d *decoder) decode(n ast.Node, v reflect.Value, field string) error {
	switch n := n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		return d.fail(n, field, "anchors, aliases and merge keys are not supported; write the value out")
	case *ast.TagNode:
		return d.fail(n, field, "tags are not supported")
	case *ast.NullNode:
		return d.fail(n, field, "has no value; leave the key out or give it one")
	}
	if v.Type() == durationType {
		return d.decodeDuration(n, v, field)
	}
	if reflect.PointerTo(v.Type()).Implements(unmarshalerType) && !isListOf(n, v) {
		return d.decodeText(n, v, field)
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return d.decode(n, v.Elem(), field)
	case reflect.Struct:
		return d.decodeStruct(n, v, field)
	case reflect.Slice:
		return d.decodeSlice(n, v, field)
	case reflect.Map:
		return d.decodeMap(n, v, field)
	default:
		return d.decodeScalar(n, v, field)
	}
}

// isListOf says that n is a list for a slice that can be written as text too:
// "one value, or several".
func isListOf(n ast.Node, v reflect.Value) bool {
	_, ok := n.(*ast.SequenceNode)
	return ok && v.Kind() == reflect.Slice
}

func (d *decoder) decodeScalar(n ast.Node, v reflect.Value, field string) error {
	switch v.Kind() {
	case reflect.String:
		s, ok := text(n)
		if !ok {
			return d.wrongType(n, field, "a string")
		}
		v.SetString(s)
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			return d.wrongType(n, field, "true or false")
		}
		v.SetBool(b.Value)
	case reflect.Float32, reflect.Float64:
		f, ok := float(n)
		if !ok {
			return d.wrongType(n, field, "a number")
		}
		v.SetFloat(f)
	default:
		return d.decodeInteger(n, v, field)
	}
	return nil
}

func (d *decoder) decodeInteger(n ast.Node, v reflect.Value, field string) error {
	i, ok := n.(*ast.IntegerNode)
	if !ok {
		return d.wrongType(n, field, "a whole number")
	}
	signed, fitsSigned := i.Value.(int64)
	unsigned, fitsUnsigned := i.Value.(uint64)
	switch {
	case fitsSigned && signed >= 0:
		unsigned, fitsUnsigned = uint64(signed), true
	case fitsUnsigned && unsigned <= math.MaxInt64:
		signed, fitsSigned = int64(unsigned), true
	}
	switch {
	case v.CanInt() && fitsSigned && !v.OverflowInt(signed):
		v.SetInt(signed)
	case v.CanUint() && fitsUnsigned && !v.OverflowUint(unsigned):
		v.SetUint(unsigned)
	case v.CanInt(), v.CanUint():
		return d.fail(n, field, "%s is out of range", i.Token.Value)
	default:
		panic("strictyaml: fields of type " + v.Type().String() + " are not supported")
	}
	return nil
}

func (d *decoder) decodeDuration(n ast.Node, v reflect.Value, field string) error {
	s, ok := text(n)
	if !ok {
		return d.wrongType(n, field, `a duration such as "1h" or "90s"`)
	}
	t, err := time.ParseDuration(s)
	if err != nil {
		return d.fail(n, field, `%q is not a duration such as "1h" or "90s"`, s)
	}
	v.SetInt(int64(t))
	return nil
}

func (d *decoder) decodeText(n ast.Node, v reflect.Value, field string) error {
	s, ok := text(n)
	if !ok {
		return d.wrongType(n, field, "a string")
	}
	u, _ := reflect.TypeAssert[encoding.TextUnmarshaler](v.Addr())
	if err := u.UnmarshalText([]byte(s)); err != nil {
		if _, isTime := u.(*time.Time); isTime {
			return d.fail(n, field, "%q is not a time such as 2027-01-01T00:00:00Z", s)
		}
		return d.fail(n, field, "%v", err)
	}
	return nil
}

func (d *decoder) decodeSlice(n ast.Node, v reflect.Value, field string) error {
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		return d.wrongType(n, field, "a list")
	}
	v.Set(reflect.MakeSlice(v.Type(), len(seq.Values), len(seq.Values)))
	for i, item := range seq.Values {
		if err := d.decode(item, v.Index(i), fmt.Sprintf("%s[%d]", field, i)); err != nil {
			return err
		}
	}
	return nil
}

func (d *decoder) decodeMap(n ast.Node, v reflect.Value, field string) error {
	pairs, err := d.pairs(n, field)
	if err != nil {
		return err
	}
	if v.Type().Key().Kind() != reflect.String {
		panic("strictyaml: map keys must be strings")
	}
	v.Set(reflect.MakeMapWithSize(v.Type(), len(pairs)))
	for _, p := range pairs {
		item := reflect.New(v.Type().Elem()).Elem()
		if err := d.decode(p.value, item, join(field, p.key)); err != nil {
			return err
		}
		v.SetMapIndex(reflect.ValueOf(p.key).Convert(v.Type().Key()), item)
	}
	return nil
}

func (d *decoder) decodeStruct(n ast.Node, v reflect.Value, field string) error {
	pairs, err := d.pairs(n, field)
	if err != nil {
		return err
	}
	names, fields, position := structFields(v.Type())
	if position >= 0 {
		v.Field(position).Set(reflect.ValueOf(positionOf(n, pairs)))
	}
	for _, p := range pairs {
		i, known := fields[p.key]
		if !known {
			e := at(d.file, p.token, field, fmt.Sprintf("unknown key %q", p.key))
			e.Suggestion = Suggest(p.key, names)
			return e
		}
		if err := d.decode(p.value, v.Field(i), join(field, p.key)); err != nil {
			return err
		}
	}
	return nil
}

// structFields maps keys to field indexes, and finds the Position field (or -1).
func structFields(t reflect.Type) (names []string, fields map[string]int, position int) {
	fields, position = make(map[string]int, t.NumField()), -1
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case !f.IsExported() || name == "-":
			continue
		case f.Type == positionType:
			position = i
			continue
		case name == "":
			name = strings.ToLower(f.Name)
		}
		fields[name], names = i, append(names, name)
	}
	return names, fields, position
}

type pair struct {
	key   string
	token *token.Token
	value ast.Node
}

// pairs lists the keys and values of a mapping and refuses duplicate keys.
func (d *decoder) pairs(n ast.Node, field string) ([]pair, error) {
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		return nil, d.wrongType(n, field, "a mapping (key: value)")
	}
	seen := make(map[string]bool, len(values))
	pairs := make([]pair, 0, len(values))
	for _, v := range values {
		key, ok := v.Key.(*ast.StringNode)
		if !ok {
			return nil, d.fail(v.Key, field, "key %s must be a plain string", v.Key.GetToken().Value)
		}
		if seen[key.Value] {
			return nil, d.fail(key, field, "duplicate key %q", key.Value)
		}
		seen[key.Value] = true
		pairs = append(pairs, pair{key: key.Value, token: key.Token, value: v.Value})
	}
	return pairs, nil
}

func positionOf(n ast.Node, pairs []pair) Position {
	p := Position{Keys: make(map[string]Position, len(pairs))}
	if t := n.GetToken(); t != nil {
		p.Line, p.Column = t.Position.Line, t.Position.Column
	}
	for i, kv := range pairs {
		k := Position{Line: kv.token.Position.Line, Column: kv.token.Position.Column}
		if p.Keys[kv.key] = k; i == 0 {
			p.Line, p.Column = k.Line, k.Column // a mapping's own token is its first colon
		}
	}
	return p
}

func (d *decoder) wrongType(n ast.Node, field, want string) *Error {
	return d.fail(n, field, "must be %s, is %s", want, describe(n))
}

func describe(n ast.Node) string {
	switch n := n.(type) {
	case *ast.StringNode, *ast.LiteralNode:
		return "a string"
	case *ast.IntegerNode, *ast.FloatNode:
		return "the number " + n.GetToken().Value
	case *ast.BoolNode:
		return n.Token.Value + " (put it in quotes to make it a string)"
	case *ast.SequenceNode:
		return "a list"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a mapping"
	default:
		return "something else"
	}
}

func text(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	}
	return "", false
}

func float(n ast.Node) (float64, bool) {
	switch n := n.(type) {
	case *ast.FloatNode:
		return n.Value, true
	case *ast.IntegerNode:
		switch x := n.Value.(type) {
		case int64:
			return float64(x), true
		case uint64:
			return float64(x), true
		}
	}
	return 0, false
}

func join(field, key string) string {
	if field == "" {
		return key
	}
	return field + "." + key
}

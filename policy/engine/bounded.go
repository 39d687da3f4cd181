package engine

// This file bounds what one call of a built-in function may take. OPA stops an
// evaluation between calls (EvaluationLimit) and not within one, so a call that works
// on much for little text would take time and memory that nobody limits: a number of
// a billion digits, a text that doubles, an expression over a long text (attack T31).
// Such a call is an error, which denies. It concerns every evaluation in a process
// that links this package.

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"merlon.dev/policy/program"
)

// Bounds of one call.
const (
	maxNumberBytes = 400     // digits of a number
	maxExponent    = 1000    // and its power of ten
	maxTextBytes   = 4 << 20 // of a text that a function makes
	maxParts       = 1 << 20 // of a value that a function writes out or walks through
	maxSorted      = 1 << 16 // elements that are sorted or multiplied
)

func init() {
	for name := range strings.FieldsSeq(allowedBuiltins) {
		if f := topdown.GetBuiltin(name); f != nil {
			topdown.RegisterBuiltinFunc(name, bounded(name, f))
		}
	}
}

func bounded(name string, f topdown.BuiltinFunc) topdown.BuiltinFunc {
	special := bounds[name]
	return func(ctx topdown.BuiltinContext, args []*ast.Term, iter func(*ast.Term) error) error {
		for _, arg := range args {
			if err := checkNumber(arg.Value); err != nil {
				return err
			}
		}
		if special != nil {
			if err := special(args); err != nil {
				return err
			}
		}
		return f(ctx, args, iter)
	}
}

// checkNumber refuses a number of which one digit more costs as much as all before.
func checkNumber(v ast.Value) error {
	n, ok := v.(ast.Number)
	if ok && !small(string(n)) {
		return fmt.Errorf("a number of more than %d digits, or above 1e%d", maxNumberBytes, maxExponent)
	}
	return nil
}

func small(number string) bool {
	if len(number) > maxNumberBytes {
		return false
	}
	i := strings.IndexAny(number, "eE")
	if i < 0 {
		return true
	}
	exponent := strings.TrimRight(number[i+1:], "BbiI") // units.parse takes "1e3" and "1E" alike
	n, err := strconv.Atoi(exponent)
	return err != nil || -maxExponent <= n && n <= maxExponent // what is no number fails by itself
}

// bounds are of functions that can make much of little.
var bounds = map[string]func(args []*ast.Term) error{
	"to_number": numberInText, "units.parse": numberInText, "units.parse_bytes": numberInText,
	"sum": numbersIn, "product": func(args []*ast.Term) error {
		if n := length(args[0].Value); n > maxNumberBytes {
			return fmt.Errorf("a product of %d numbers", n)
		}
		return numbersIn(args)
	},
	"sort": sorted, "union": written, "intersection": written,
	"json.marshal": written, "urlquery.encode_object": written, "walk": nil,
	"concat": func(args []*ast.Term) error {
		separator, _ := args[0].Value.(ast.String)
		return textOf(weigh(args[1].Value, maxTextBytes) + len(separator)*length(args[1].Value))
	},
	"internal.template_string": func(args []*ast.Term) error { return textOf(weigh(args[0].Value, maxTextBytes)) },
	"sprintf":                  formatted,
	"replace": func(args []*ast.Term) error {
		s, old, with := stringOf(args[0]), stringOf(args[1]), stringOf(args[2])
		return textOf(len(s) + strings.Count(s, old)*len(with))
	},
	"strings.replace_n": func(args []*ast.Term) error {
		return textOf((len(stringOf(args[1])) + 1) * weigh(args[0].Value, maxTextBytes))
	},
	"regex.match": matching, "regex.find_n": matching, "regex.find_all_string_submatch_n": matching, "regex.split": matching,
	"regex.replace": func(args []*ast.Term) error {
		s, with := stringOf(args[0]), stringOf(args[2])
		if err := textOf(len(s) + (len(s)+1)*len(with) + strings.Count(with, "$")*len(s)); err != nil {
			return err
		}
		return matching([]*ast.Term{args[1], args[0]})
	},
	"glob.match": func(args []*ast.Term) error {
		if pattern, s := len(stringOf(args[0])), len(stringOf(args[2])); pattern*s > program.MaxSteps/64 {
			return fmt.Errorf("a pattern of %d bytes on a text of %d", pattern, s)
		}
		return nil
	},
}

func stringOf(t *ast.Term) string {
	s, _ := t.Value.(ast.String)
	return string(s)
}

func textOf(n int) error {
	if n > maxTextBytes {
		return fmt.Errorf("a text of more than %d bytes", maxTextBytes)
	}
	return nil
}

func numberInText(args []*ast.Term) error {
	if !small(stringOf(args[0])) {
		return checkNumber(ast.Number(stringOf(args[0])))
	}
	return nil
}

func numbersIn(args []*ast.Term) (err error) {
	each(args[0].Value, func(t *ast.Term) {
		if err == nil {
			err = checkNumber(t.Value)
		}
	})
	return err
}

func sorted(args []*ast.Term) error {
	if n := length(args[0].Value); n > maxSorted {
		return fmt.Errorf("%d elements to sort", n)
	}
	return written(args)
}

// written refuses a value that is small in memory, because its parts are the same
// ones, and large where they are written out or compared one by one.
func written(args []*ast.Term) error {
	if weigh(args[0].Value, maxParts) > maxParts {
		return fmt.Errorf("a value of more than %d parts", maxParts)
	}
	return nil
}

// weigh is about how many bytes v takes when it is written out; it stops beyond most.
func weigh(v ast.Value, most int) (n int) {
	switch v := v.(type) {
	case ast.String:
		return len(v) + 1
	case ast.Number:
		return len(v) + 1
	case *ast.Array, ast.Object, ast.Set:
		n = 1
		each(v, func(t *ast.Term) {
			if n <= most {
				n += weigh(t.Value, most-n)
			}
		})
		return n
	}
	return 8
}

// each gives the members of a collection, and the keys of an object.
func each(v ast.Value, do func(*ast.Term)) {
	switch v := v.(type) {
	case *ast.Array:
		v.Foreach(do)
	case ast.Set:
		v.Foreach(do)
	case ast.Object:
		v.Foreach(func(key, value *ast.Term) { do(key); do(value) })
	}
}

func length(v ast.Value) int {
	switch v := v.(type) {
	case *ast.Array:
		return v.Len()
	case ast.Set:
		return v.Len()
	case ast.Object:
		return v.Len()
	}
	return 0
}

// formatted bounds sprintf: the widths that the format asks for, and arguments that it
// names several times.
func formatted(args []*ast.Term) error {
	format, widths, verbs := stringOf(args[0]), 0, 0
	for i := 0; i < len(format); i++ {
		if format[i] != '%' {
			continue
		}
		for i++; i < len(format) && strings.IndexByte("+-# 0.[]*123456789", format[i]) >= 0; i++ {
			if format[i] == '*' {
				return errors.New("a width that is an argument")
			}
			n := 0
			for ; i < len(format) && '0' <= format[i] && format[i] <= '9'; i++ {
				n = min(n*10+int(format[i]-'0'), maxTextBytes)
			}
			if widths += n; n > 0 {
				i--
			}
		}
		verbs++
	}
	largest := 0
	each(args[1].Value, func(t *ast.Term) { largest = max(largest, weigh(t.Value, maxTextBytes)) })
	if err := numbersIn(args[1:]); err != nil {
		return err
	}
	return textOf(len(format) + widths + verbs*largest)
}

// matching bounds a regular expression, whose cost is that of its compiled form for
// each byte of the text.
func matching(args []*ast.Term) error {
	if steps := program.PatternCost(stringOf(args[0])) * (len(stringOf(args[1])) + 1); steps > program.MaxSteps {
		return fmt.Errorf("a regular expression that may take %d steps; at most %d are taken", steps, program.MaxSteps)
	}
	return nil
}

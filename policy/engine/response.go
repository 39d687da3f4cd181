package engine

// This file reads the object that an allow of opa-envoy-plugin's kind is: what is
// to be sent beside the decision. Of what that plugin knows it takes http_status,
// body, headers, response_headers_to_add and request_headers_to_remove;
// dynamic_metadata steers other filters of an Envoy and says nothing to us. What
// would change the URL that was decided about is an error, and so is whatever
// cannot be sent.

import (
	"errors"
	"fmt"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
)

// readResponse reads what Module says is to be sent; nil for a boolean answer.
func readResponse(t *ast.Term) (*policy.Response, error) {
	if t == nil {
		return nil, nil
	}
	object, ok := t.Value.(ast.Object)
	if !ok {
		return nil, nil // null: a boolean answer, or one that another outweighs
	}
	return responseOf(object)
}

func responseOf(object ast.Object) (*policy.Response, error) {
	var r policy.Response
	err := object.Iter(func(key, value *ast.Term) error {
		name, _ := key.Value.(ast.String)
		if err := readField(&r, string(name), value.Value); err != nil {
			return fmt.Errorf("%s: %w", string(name), err)
		}
		return nil
	})
	if err == nil {
		err = r.Check()
	}
	if err != nil {
		return nil, err
	}
	if r.Equal(&policy.Response{}) {
		return nil, nil
	}
	return &r, nil
}

func readField(r *policy.Response, name string, v ast.Value) error {
	switch name {
	case "http_status":
		n, ok := v.(ast.Number)
		if ok {
			r.Status, ok = n.Int()
		}
		if !ok || r.Status == 0 {
			return errors.New("is no status")
		}
	case "body":
		text, ok := v.(ast.String)
		if !ok {
			return errors.New("is no string")
		}
		r.Body = string(text)
	case "headers":
		return readHeaders(&r.Headers, v)
	case "response_headers_to_add":
		return readHeaders(&r.ResponseHeaders, v)
	case "request_headers_to_remove":
		return eachText(v, func(name string) { r.RemoveHeaders = append(r.RemoveHeaders, strings.ToLower(name)) })
	case "query_parameters_to_set", "query_parameters_to_remove":
		return errors.New("is not supported: the URL that was decided about is the one that is served")
	}
	return nil
}

// readHeaders reads an object of names and values, strings or arrays of them, or
// an array of such objects.
func readHeaders(to *[]policy.HeaderField, v ast.Value) error {
	switch v := v.(type) {
	case *ast.Array:
		return v.Iter(func(t *ast.Term) error {
			if _, ok := t.Value.(ast.Object); !ok {
				return errors.New("an element is no object")
			}
			return readHeaders(to, t.Value)
		})
	case ast.Object:
		return v.Iter(func(key, value *ast.Term) error {
			name, ok := key.Value.(ast.String)
			if !ok {
				return errors.New("a name is no string")
			}
			add := func(text string) {
				*to = append(*to, policy.HeaderField{Name: strings.ToLower(string(name)), Value: text})
			}
			if text, ok := value.Value.(ast.String); ok {
				add(string(text))
				return nil
			}
			return eachText(value.Value, add)
		})
	}
	return errors.New("is no object")
}

func eachText(v ast.Value, do func(string)) error {
	array, ok := v.(*ast.Array)
	if !ok {
		return errors.New("is neither a string nor an array of strings")
	}
	return array.Iter(func(t *ast.Term) error {
		text, ok := t.Value.(ast.String)
		if !ok {
			return errors.New("an element is no string")
		}
		do(string(text))
		return nil
	})
}

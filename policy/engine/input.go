package engine

// This file builds the input document of opa-envoy-plugin's shape from a
// policy.Input, as syntax tree values directly: by way of Go maps it would
// cost more than the decision.

import (
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
	"merlon.dev/policy/grant"
)

// Document is the input of in as policies see it, for `merlon policy test`
// and for those who evaluate a bundle with another OPA.
func Document(in *policy.Input) ast.Value { return object(envoyFields(in)...).Value }

// input is what e evaluates: the call as Module's answer takes it, and beside
// it the document for the policy's own Rego, if there is any.
func (e *Engine) input(in *policy.Input) ast.Value {
	call := field{"merlon", e.call(in)}
	if !e.ownRego {
		return object(call).Value
	}
	return object(append(envoyFields(in), call)...).Value
}

func (e *Engine) call(in *policy.Input) *ast.Term {
	path, method := ast.NullTerm(), ast.NullTerm()
	switch in.Protocol {
	case policy.HTTP:
		path, method = text(in.Path), text(in.Method)
	case policy.GRPC:
		if service, rpc, ok := grant.SplitRPC(in.Path); ok {
			path, method = text(service), text(rpc)
		}
	case policy.TCP:
		path = text("")
	}
	found := e.leaves.lookup(in)
	return object(field{"deny", ast.ArrayTerm(found.deny...)}, field{"allow", ast.ArrayTerm(found.allow...)},
		field{"dry_run", ast.ArrayTerm(found.dryRun...)}, field{"path", path},
		field{"method", method}, field{"rego", ast.InternedTerm(e.ownRego)})
}

type field struct {
	key   string
	value *ast.Term
}

func object(fields ...field) *ast.Term {
	pairs := make([][2]*ast.Term, len(fields))
	for i, f := range fields {
		pairs[i] = [2]*ast.Term{ast.InternedTerm(f.key), f.value}
	}
	return ast.ObjectTerm(pairs...)
}

func text(s string) *ast.Term { return ast.StringTerm(s) }

func envoyFields(in *policy.Input) []field {
	attributes := []field{
		{"source", object(field{"principal", text(in.Source)}, address(in.SourceAddress))},
		{"destination", object(field{"principal", text(in.Destination)}, address(in.DestinationAddress))},
	}
	if in.Protocol == policy.HTTP || in.Protocol == policy.GRPC {
		attributes = append(attributes, field{"request", object(field{"http", request(in)})})
	}
	return append(extras(in), field{"attributes", object(attributes...)}, field{"protocol", text(string(in.Protocol))})
}

func request(in *policy.Input) *ast.Term {
	path := in.Path
	if in.Query != "" {
		path += "?" + in.Query
	}
	single, all := headers(in.Headers)
	return object(field{"method", text(in.Method)}, field{"path", text(path)},
		field{"host", text(in.Host)}, field{"headers", single}, field{"headers_all", all})
}

// headers gives single values as strings, as opa-envoy-plugin does, joining
// several with "," as Envoy does, and under headers_all every value (T16).
func headers(h map[string][]string) (first, all *ast.Term) {
	var single, lists []field
	for _, name := range slices.Sorted(maps.Keys(h)) {
		single = append(single, field{name, text(strings.Join(h[name], ","))})
		lists = append(lists, field{name, texts(h[name])})
	}
	return object(single...), object(lists...)
}

func texts(items []string) *ast.Term {
	terms := make([]*ast.Term, len(items))
	for i, s := range items {
		terms[i] = text(s)
	}
	return ast.ArrayTerm(terms...)
}

// address is the Envoy form of "ip:port".
func address(s string) field {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return field{"address", object()}
	}
	parts := []field{{"address", text(host)}}
	if n, err := strconv.Atoi(port); err == nil {
		parts = append(parts, field{"portValue", ast.InternedTerm(n)})
	}
	return field{"address", object(field{"socketAddress", object(parts...)})}
}

// extras are what lies beside attributes: parsed_path and parsed_query as
// opa-envoy-plugin gives them, and Merlon's spiffe and grpc.
func extras(in *policy.Input) []field {
	fields := []field{
		{"spiffe", object(field{"source", spiffe(in.Source)}, field{"destination", spiffe(in.Destination)})},
		{"parsed_body", ast.NullTerm()},
		{"truncated_body", ast.InternedTerm(false)},
	}
	if in.Protocol != policy.HTTP && in.Protocol != policy.GRPC {
		return fields
	}
	path, err := url.PathUnescape(in.Path)
	if err != nil {
		path = in.Path
	}
	fields = append(fields, field{"parsed_path", texts(strings.Split(strings.TrimLeft(path, "/"), "/"))})
	query, _ := url.ParseQuery(in.Query) // as url.URL.Query: what is malformed is left out
	var values []field
	for _, name := range slices.Sorted(maps.Keys(query)) {
		values = append(values, field{name, texts(query[name])})
	}
	fields = append(fields, field{"parsed_query", object(values...)})
	if service, method, ok := grant.SplitRPC(in.Path); ok && in.Protocol == policy.GRPC {
		fields = append(fields, field{"grpc", object(field{"service", text(service)}, field{"method", text(method)})})
	}
	return fields
}

func spiffe(id string) *ast.Term {
	domain, path, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	if path != "" {
		path = "/" + path
	}
	return object(field{"id", text(id)}, field{"trust_domain", text(domain)}, field{"path", text(path)})
}

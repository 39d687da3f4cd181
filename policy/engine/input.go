package engine

// This file builds the input document of opa-envoy-plugin's shape from a
// policy.Input, as syntax tree values directly: by way of Go maps it would
// cost more than the decision.

import (
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"merlon.dev/policy"
	"merlon.dev/policy/engine/residual"
)

// callTerms is a call as Module takes it under input.merlon.
type callTerms struct {
	found
	path, method *ast.Term
}

func (e *Engine) lookUp(in *policy.Input, now time.Time) callTerms {
	c := callTerms{found: e.leaves.lookup(in, now), path: ast.InternedNullTerm, method: ast.InternedNullTerm}
	switch in.Protocol {
	case policy.HTTP:
		c.path, c.method = text(policy.DecodePath(in.Path)), ast.InternedTerm(in.Method)
	case policy.GRPC:
		if service, rpc, ok := policy.SplitRPC(in.Path); ok {
			c.path, c.method = text(service), text(rpc)
		}
	case policy.TCP:
		c.path = ast.InternedEmptyString
	}
	return c
}

// input is what e evaluates: the call, and beside it the document for the
// policy's own Rego, if there is any.
func (e *Engine) input(in *policy.Input, c *callTerms) *ast.Term {
	fields := append(make([]field, 0, 5), field{"path", c.path}, field{"method", c.method})
	for _, kind := range [...]field{{"deny", c.deny}, {"allow", c.allow}, {"dry_run", c.dryRun}} {
		if kind.value != nil {
			fields = append(fields, kind)
		}
	}
	call := field{"merlon", object(fields...)}
	if !e.ownRego {
		return object(call)
	}
	return object(append(envoyFields(in, &e.parts), call)...)
}

// part is a part of the input that is built only for policies that can read it.
type part int

const (
	sourceAddress part = iota
	destinationAddress
	requestPath
	requestHost
	requestHeaders
	requestHeadersAll
	spiffeParts
	parsedPath
	parsedQuery
	numParts
)

// partPlaces are where they stand.
var partPlaces = [numParts]ast.Ref{
	sourceAddress:      ast.MustParseRef("input.attributes.source.address"),
	destinationAddress: ast.MustParseRef("input.attributes.destination.address"),
	requestPath:        ast.MustParseRef("input.attributes.request.http.path"),
	requestHost:        ast.MustParseRef("input.attributes.request.http.host"),
	requestHeaders:     ast.MustParseRef("input.attributes.request.http.headers"),
	requestHeadersAll:  ast.MustParseRef("input.attributes.request.http.headers_all"),
	spiffeParts:        ast.MustParseRef("input.spiffe"),
	parsedPath:         ast.MustParseRef("input.parsed_path"),
	parsedQuery:        ast.MustParseRef("input.parsed_query"),
}

// parts are those that a policy can read.
type parts [numParts]bool

// allParts is the whole document, as other OPAs get it.
var allParts = func() (p parts) {
	for i := range p {
		p[i] = true
	}
	return p
}()

// partsOf are the parts that the policy can read; all where that cannot be found.
func partsOf(c *ast.Compiler) parts {
	reads, err := residual.Reading(c, partPlaces[:])
	if err != nil {
		return allParts
	}
	return parts(reads)
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

// OPA keeps terms of these strings, so that a call does not make them anew.
func init() {
	ast.InternStringTerm("merlon", "deny", "allow", "dry_run", "path", "method",
		"attributes", "source", "destination", "principal", "address", "socketAddress", "portValue",
		"request", "host", "headers", "headers_all", "parsed_path", "parsed_query", "parsed_body", "truncated_body",
		"spiffe", "jwt", "id", "trust_domain", "service", "protocol", "http", "grpc", "tcp",
		http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions)
}

func text(s string) *ast.Term { return ast.StringTerm(s) }

func envoyFields(in *policy.Input, read *parts) []field {
	source, destination := []field{{"principal", text(in.Source)}}, []field{{"principal", text(in.Destination)}}
	if read[sourceAddress] {
		source = append(source, address(in.SourceAddress))
	}
	if read[destinationAddress] {
		destination = append(destination, address(in.DestinationAddress))
	}
	attributes := []field{{"source", object(source...)}, {"destination", object(destination...)}}
	if in.Protocol == policy.HTTP || in.Protocol == policy.GRPC {
		attributes = append(attributes, field{"request", object(field{"http", request(in, read)})})
	}
	return append(extras(in, read), field{"attributes", object(attributes...)}, field{"protocol", ast.InternedTerm(string(in.Protocol))})
}

func request(in *policy.Input, read *parts) *ast.Term {
	fields := append(make([]field, 0, 5), field{"method", ast.InternedTerm(in.Method)})
	if read[requestPath] {
		path := in.Path
		if in.Query != "" {
			path += "?" + in.Query
		}
		fields = append(fields, field{"path", text(path)})
	}
	if read[requestHost] {
		fields = append(fields, field{"host", text(in.Host)})
	}
	return object(headers(fields, in, read)...)
}

// headers gives single values as strings, as opa-envoy-plugin does, joining
// several with "," as Envoy does, and under headers_all every value (T16).
func headers(to []field, in *policy.Input, read *parts) []field {
	if !read[requestHeaders] && !read[requestHeadersAll] {
		return to
	}
	h := in.HeaderMap()
	var single, lists []field
	for _, name := range slices.Sorted(maps.Keys(h)) {
		if read[requestHeaders] {
			single = append(single, field{name, text(strings.Join(h[name], ","))})
		}
		if read[requestHeadersAll] {
			lists = append(lists, field{name, texts(h[name])})
		}
	}
	if read[requestHeaders] {
		to = append(to, field{"headers", object(single...)})
	}
	if read[requestHeadersAll] {
		to = append(to, field{"headers_all", object(lists...)})
	}
	return to
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
// opa-envoy-plugin gives them, and Merlon's spiffe, jwt and grpc.
func extras(in *policy.Input, read *parts) []field {
	fields := []field{{"parsed_body", ast.NullTerm()}, {"truncated_body", ast.InternedTerm(false)}}
	if read[spiffeParts] {
		fields = append(fields, field{"spiffe", object(field{"source", spiffe(in.Source)}, field{"destination", spiffe(in.Destination)})})
	}
	if in.JWT != nil {
		if claims, err := ast.InterfaceToValue(in.JWT); err == nil { // as JSON always is
			fields = append(fields, field{"jwt", ast.NewTerm(claims)})
		}
	}
	if in.Protocol != policy.HTTP && in.Protocol != policy.GRPC {
		return fields
	}
	if read[parsedPath] {
		fields = append(fields, field{"parsed_path", texts(strings.Split(strings.TrimLeft(policy.DecodePath(in.Path), "/"), "/"))})
	}
	if read[parsedQuery] {
		fields = append(fields, field{"parsed_query", queryOf(in.Query)})
	}
	if service, method, ok := policy.SplitRPC(in.Path); ok && in.Protocol == policy.GRPC {
		fields = append(fields, field{"grpc", object(field{"service", text(service)}, field{"method", text(method)})})
	}
	return fields
}

func queryOf(raw string) *ast.Term {
	parsed, _ := url.ParseQuery(raw) // as url.URL.Query: what is malformed is left out
	var values []field
	for _, name := range slices.Sorted(maps.Keys(parsed)) {
		values = append(values, field{name, texts(parsed[name])})
	}
	return object(values...)
}

func spiffe(id string) *ast.Term {
	domain, path, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	if path != "" {
		path = "/" + path
	}
	return object(field{"id", text(id)}, field{"trust_domain", text(domain)}, field{"path", text(path)})
}

// What a request is, in the words of the policy and of the access log, and which of
// its fields go on.

package http1

import (
	"strings"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// describe says what the request is. Of one that is malformed it says what can be
// said.
func (s *session) describe(c *call) {
	text := string(s.req.raw)
	method := text[:len(s.req.method)]
	target := ""
	if len(s.req.target) > 0 {
		target = text[len(method)+1:][:len(s.req.target)]
	}
	path, query, _ := strings.Cut(target, "?")
	c.in = policy.Input{
		Protocol: s.hop.Protocol, Method: method, Path: path, Query: query, Host: string(s.req.host),
		SourceAddress: s.caller.Remote, DestinationAddress: s.caller.Local,
	}
	s.entry.Method, s.entry.Path, s.entry.Host = method, path, c.in.Host
	s.entry.Trace = s.hop.Trace(s.ctx, &s.entry, s.fieldValues)
	if s.hop.Direction == hop.Inbound {
		s.describeFields(c, text)
		return
	}
	for i := range s.req.fields {
		f := &s.req.fields[i]
		f.drop = s.ofConnection(f, "") || s.entry.Trace != nil && s.entry.Trace.Replaces(lowerName(s.req.name(f)))
	}
}

// describeFields gives the policy the fields that the app will see, and marks those
// that it will not.
func (s *session) describeFields(c *call, text string) {
	s.names = s.names[:0]
	headers := make(policy.HeaderMap, len(s.req.fields))
	c.in.Headers = headers
	values := make([]string, len(s.req.fields))
	for i := range s.req.fields {
		f := &s.req.fields[i]
		name := lowerName(s.req.name(f))
		s.names = append(s.names, name)
		if f.drop = s.ofConnection(f, name) || s.hop.Strip(name) || s.entry.Trace.Replaces(name); f.drop || f.kind == host || f.kind == transferEncoding {
			continue
		}
		values[i] = text[f.value:f.valueEnd]
		if had := headers[name]; had != nil {
			headers[name] = append(had, values[i])
		} else {
			headers[name] = values[i : i+1 : i+1]
		}
	}
}

// fieldValues are those of a field of the request, whose name is in lower case.
func (s *session) fieldValues(name string) (values []string) {
	for i := range s.req.fields {
		if f := &s.req.fields[i]; equalFold(s.req.name(f), name) {
			values = append(values, string(s.req.val(f)))
		}
	}
	return values
}

// ofConnection says whether a field is for the caller's connection alone. lower is its
// name in lower case; empty where nobody has needed it yet.
func (s *session) ofConnection(f *field, lower string) bool {
	switch {
	case f.kind == connection, f.kind == hopByHop:
		return true
	case len(s.req.named) == 0 || f.kind != other:
		return false
	case lower == "":
		lower = lowerName(s.req.name(f))
	}
	return s.req.names(lower)
}

package kept

// This file writes down what a decision depends on.

import (
	"encoding/binary"
	"slices"

	"merlon.dev/policy"
)

// key appends what the decision about in depends on. Each text has its length in
// front, so that no two calls share a key.
func (c *Cache) key(b []byte, in *policy.Input) []byte {
	b = text(b, in.Source)
	b = text(b, in.Destination)
	b = text(b, string(in.Protocol))
	b = text(b, in.Method)
	b = text(b, in.Path)
	r := &c.reads
	if r.Query {
		b = text(b, in.Query)
	}
	if r.Host {
		b = text(b, in.Host)
	}
	if r.SourceAddress {
		b = text(b, in.SourceAddress)
	}
	if r.DestinationAddress {
		b = text(b, in.DestinationAddress)
	}
	if r.AllHeaders {
		return allHeaders(b, in.HeaderMap())
	}
	for _, name := range r.Headers {
		values, present := in.Header(name)
		b = header(b, values, present)
	}
	return b
}

func text(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func allHeaders(b []byte, headers policy.HeaderMap) []byte {
	names := make([]string, 0, len(headers))
	for name := range headers {
		names = append(names, name)
	}
	slices.Sort(names)
	b = binary.AppendUvarint(b, uint64(len(names)))
	for _, name := range names {
		b = header(text(b, name), headers[name], true)
	}
	return b
}

// header appends the values of one; none is something else than an empty list.
func header(b []byte, values []string, present bool) []byte {
	if !present {
		return binary.AppendUvarint(b, 0)
	}
	b = binary.AppendUvarint(b, uint64(len(values))+1)
	for _, v := range values {
		b = text(b, v)
	}
	return b
}

// Which protocols there are, what each offers by TLS, and what serves it.

package sidecar

import (
	"maps"
	"slices"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
	"merlon.dev/sdk/sidecar/internal/http1"
	"merlon.dev/sdk/sidecar/internal/http2"
	"merlon.dev/sdk/sidecar/internal/relay"
)

// engine is how the sidecar speaks one protocol.
type engine struct {
	// asks is what a policy is asked about.
	asks policy.Protocol
	// alpn is what both ends of a hop's TLS agree on. It is what the app speaks, so
	// that nothing is ever translated from one form of HTTP to another, where
	// requests get smuggled (SECURITY.md T17).
	alpn []string
	make func(*hop.Hop) hop.Engine
}

// engines are the protocols by their name in the configuration.
var engines = map[string]engine{
	"grpc":  {asks: policy.GRPC, alpn: []string{"h2"}, make: http2.New},
	"http":  {asks: policy.HTTP, alpn: []string{"http/1.1"}, make: http1.New},
	"http2": {asks: policy.HTTP, alpn: []string{"h2"}, make: http2.New},
	"tcp":   {asks: policy.TCP, make: relay.New},
}

func protocols() []string { return slices.Sorted(maps.Keys(engines)) }

// The settings of limits: how much of a listener may be under way at the same time, and
// how long it may take.

package sidecar

import (
	"fmt"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// Limits are how much may be under way at the same time. What is too much is refused at
// once, and counted: a queue would only have callers wait for what cannot be done.
type Limits struct {
	// MaxConnections is of callers at this listener; more are reset. Zero means the
	// max_connections of the whole file.
	MaxConnections int `yaml:"max_connections"`
	// MaxRequests is of requests at this listener. Zero means no limit.
	MaxRequests int `yaml:"max_requests"`
	// UpstreamConnections is of connections to each upstream, kept ones too. Zero means
	// no limit.
	UpstreamConnections int `yaml:"upstream_connections"`
	// UpstreamRequests is of requests to each upstream. Zero means no limit.
	UpstreamRequests int `yaml:"upstream_requests"`
}

const maxLimit = 1 << 20

func (l Limits) validate(field, protocol string) error {
	for _, f := range []struct {
		field string
		value int
	}{
		{"max_connections", l.MaxConnections},
		{"max_requests", l.MaxRequests},
		{"upstream_connections", l.UpstreamConnections},
		{"upstream_requests", l.UpstreamRequests},
	} {
		if f.value < 0 || f.value > maxLimit {
			return &InvalidError{Field: field + "." + f.field, Reason: fmt.Sprintf("%d is not between 0 and %d", f.value, maxLimit)}
		}
	}
	if protocol == "tcp" && l.MaxRequests+l.UpstreamRequests > 0 {
		return &InvalidError{Field: field, Reason: "protocol tcp knows no requests", Hint: "max_connections, upstream_connections"}
	}
	return nil
}

// apply sets what is of the listener.
func (l Limits) apply(to *hop.Limits) {
	if l.MaxConnections > 0 {
		to.Connections = l.MaxConnections
	}
	to.Requests = l.MaxRequests
}

// ofUpstreams are the limits without those of the listener.
func (l Limits) ofUpstreams() Limits {
	l.MaxConnections, l.MaxRequests = 0, 0
	return l
}

// Timeouts are those of one listener, in the place of the whole file's. Zero means those,
// and for Request that there is none.
type Timeouts struct {
	// Connect is for connecting to an upstream, TLS included.
	Connect time.Duration `yaml:"connect"`
	// Idle closes a connection between two requests, or of protocol tcp while nothing
	// moves on it.
	Idle time.Duration `yaml:"idle"`
	// Stall ends a request of which nothing moves any more.
	Stall time.Duration `yaml:"stall"`
	// Response ends a request whose answer does not begin; not of gRPC.
	Response time.Duration `yaml:"response"`
	// Request ends a request that is not over, a gRPC stream too; not a WebSocket. Over
	// HTTP/2 it is looked for once a second.
	Request time.Duration `yaml:"request"`
}

func (t Timeouts) validate(field, protocol string) error {
	for _, f := range []struct {
		field string
		value time.Duration
		tcp   bool
	}{
		{"connect", t.Connect, true},
		{"idle", t.Idle, true},
		{"stall", t.Stall, false},
		{"response", t.Response, false},
		{"request", t.Request, false},
	} {
		switch {
		case f.value < 0:
			return &InvalidError{Field: field + "." + f.field, Reason: fmt.Sprintf("%v is negative", f.value)}
		case f.value > 0 && protocol == "tcp" && !f.tcp:
			return &InvalidError{Field: field + "." + f.field, Reason: "protocol tcp knows no requests", Hint: "idle"}
		}
	}
	return nil
}

// apply sets them for a listener of that protocol.
func (t Timeouts) apply(to *hop.Limits, protocol string) {
	set := func(to *time.Duration, value time.Duration) {
		if value > 0 {
			*to = value
		}
	}
	set(&to.HandshakeTimeout, t.Connect)
	if protocol == "tcp" {
		set(&to.QuietTimeout, t.Idle)
	} else {
		set(&to.IdleTimeout, t.Idle)
	}
	set(&to.StallTimeout, t.Stall)
	set(&to.ResponseTimeout, t.Response)
	to.RequestTimeout = t.Request
}

// The settings of limits: how much may be under way at the same time.

package sidecar

import (
	"fmt"

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

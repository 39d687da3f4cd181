// The hops that a configuration describes.

package sidecar

import (
	"slices"
	"strings"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// plan is what is to be served at one address.
type plan struct {
	address  string
	protocol string
	make     func(s *Sidecar) (*hop.Hop, engine)
}

// plans are all of a configuration: inbound ones first.
func (c Config) plans() (all []plan) {
	for _, in := range c.Inbound {
		all = append(all, plan{in.Listen, in.Protocol, func(s *Sidecar) (*hop.Hop, engine) { return s.inbound(&c, in), engines[in.Protocol] }})
	}
	for _, out := range c.Outbound {
		if out.Listen != "" { // else its connections are captured
			all = append(all, plan{out.Listen, out.Protocol, func(s *Sidecar) (*hop.Hop, engine) { return s.outbound(&c, out), engines[out.Protocol] }})
		}
	}
	for _, address := range c.capturedAddresses() {
		all = append(all, plan{address, captured, func(s *Sidecar) (*hop.Hop, engine) { return s.captured(&c, address) }})
	}
	return all
}

// inbound is the hop from callers to the app.
func (s *Sidecar) inbound(c *Config, in Inbound) *hop.Hop {
	h := s.hop(c, in.Listen, hop.Inbound, in.Protocol, s.id.ID().String())
	in.behind().apply(h, in.Protocol)
	h.Upstreams = s.upstreams.inbound(h, in)
	return h
}

// outbound is the hop from the app to a service.
func (s *Sidecar) outbound(c *Config, out Outbound) *hop.Hop {
	h := s.hop(c, out.Listen, hop.Outbound, out.Protocol, out.To)
	out.behind().apply(h, out.Protocol)
	h.Upstreams = s.upstreams.outbound(h, out)
	return h
}

// apply sets for a hop what is its listener's own.
func (b behind) apply(h *hop.Hop, protocol string) {
	b.limits.apply(&h.Limits)
	b.timeouts.apply(&h.Limits, protocol)
	h.Retry = b.retry.hop()
}

// strips says which fields never come to the app: those that claim an identity, and the
// listed ones, also with underscores, which CGI takes for dashes.
func strips(listed []string) func(name string) bool {
	folded := make([]string, len(listed))
	for i, name := range listed {
		folded[i] = strings.ReplaceAll(name, "_", "-")
	}
	return func(name string) bool {
		return policy.ClaimsIdentity(name) || len(folded) > 0 && slices.Contains(folded, strings.ReplaceAll(name, "_", "-"))
	}
}

func (s *Sidecar) hop(c *Config, name string, direction hop.Direction, protocol, to string) *hop.Hop {
	h := &hop.Hop{
		Name: name, Direction: direction, Protocol: engines[protocol].asks, Identity: s.id, To: to, Limits: c.limits(),
		Strip: strips(c.StripHeaders),
	}
	counted := s.metrics.of(h)
	h.Count = counted.count
	h.Record = func(e *hop.Entry) {
		counted.observe(e)
		s.recent.add(h, e)
		s.access.write(h, e)
		e.Trace.End(h, e)
	}
	return h
}

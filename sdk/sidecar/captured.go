// Connections that capture brings (package capture): where they were meant to go says
// which outbound hop they are for. Those that are for none are refused.

package sidecar

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"merlon.dev/sdk/sidecar/capture"
	"merlon.dev/sdk/sidecar/internal/hop"
	"merlon.dev/sdk/sidecar/internal/sock"
)

// destination is where connections can be meant to go.
type destination struct {
	net  netip.Prefix
	port uint16
}

// parseDestination reads "10.0.0.7:80", "10.1.0.0/16:80" or "[fd00::/64]:80".
func parseDestination(text string) (destination, error) {
	bad := fmt.Errorf("%q is not an address or network and a port, such as 10.0.0.7:80, 10.1.0.0/16:80 or [fd00::/64]:80", text)
	where, port, err := net.SplitHostPort(text)
	if err != nil {
		return destination{}, bad
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return destination{}, bad
	}
	if !strings.Contains(where, "/") {
		addr, err := netip.ParseAddr(where)
		if err != nil || addr.Zone() != "" || addr.Is4In6() {
			return destination{}, bad
		}
		return destination{netip.PrefixFrom(addr, addr.BitLen()), uint16(n)}, nil
	}
	prefix, err := netip.ParsePrefix(where)
	if err != nil || prefix != prefix.Masked() || prefix.Addr().Is4In6() {
		return destination{}, bad
	}
	return destination{prefix, uint16(n)}, nil
}

// captured is the name of hops for captured connections, in the place of a listener.
const captured = "captured"

// capturedAddresses are where captured connections arrive: on both loopback addresses,
// as far as the machine has them.
func (c Config) capturedAddresses() (all []string) {
	if c.CapturedPort == 0 {
		return nil
	}
	all = append(all, fmt.Sprintf("127.0.0.1:%d", c.CapturedPort))
	addresses, err := net.InterfaceAddrs()
	isV6Loopback := func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(net.IPv6loopback)
	}
	if err != nil || slices.ContainsFunc(addresses, isV6Loopback) {
		all = append(all, fmt.Sprintf("[::1]:%d", c.CapturedPort))
	}
	return all
}

// captured is the hop of a port for captured connections, and its engine, behind which
// are those of the outbound hops that have captures.
func (s *Sidecar) captured(c *Config, address string) (*hop.Hop, engine) {
	var upstreams []*hop.Upstream // of all of them, to be shown
	r := newRouter(c, s.log, func(out Outbound) hop.Engine {
		out.Listen = captured
		h := s.outbound(c, out)
		upstreams = append(upstreams, h.Upstreams.All()...)
		return engines[out.Protocol].make(h)
	})
	h := s.hop(c, address, hop.Outbound, "tcp", captured)
	h.Upstreams = hop.NewUpstreams(upstreams...)
	return h, engine{make: func(*hop.Hop) hop.Engine { return r }}
}

// checkCaptured: each destination has one hop, and there is a port if there are any.
func (c Config) checkCaptured() error {
	seen := map[destination]string{}
	for i := range c.Outbound {
		for j, text := range c.Outbound[i].Captures {
			field := fmt.Sprintf("outbound[%d].captures[%d]", i, j)
			d, err := parseDestination(text)
			if err != nil {
				return &InvalidError{Field: field, Reason: err.Error()}
			}
			if other := seen[d]; other != "" {
				return &InvalidError{Field: field, Reason: fmt.Sprintf("%s is that of %s", text, other)}
			}
			seen[d] = field
		}
	}
	switch {
	case c.CapturedPort < 0 || c.CapturedPort > 65535:
		return &InvalidError{Field: "captured_port", Reason: fmt.Sprintf("%d is no port", c.CapturedPort)}
	case len(seen) > 0 && c.CapturedPort == 0:
		return &InvalidError{Field: "captured_port", Reason: "is missing, and there are captures", Hint: "captured_port: 15001, and merlon-sidecar capture install -outbound-port 15001"}
	case len(seen) == 0 && c.CapturedPort != 0:
		return &InvalidError{Field: "captured_port", Reason: "is set, and no outbound has captures: every captured connection would be refused", Hint: "captures: [10.0.0.7:80] in an outbound"}
	}
	return nil
}

// route is a destination and what serves connections there.
type route struct {
	destination
	engine hop.Engine
}

// router is the engine of the port for captured connections: it finds the one that a
// connection is for.
type router struct {
	routes  []route // the narrowest network first
	engines []hop.Engine
	log     *slog.Logger
	lastLog atomic.Int64 // in seconds: whoever connects can cause a line
}

// newRouter routes to the outbound hops of c that have captures.
func newRouter(c *Config, log *slog.Logger, engineOf func(Outbound) hop.Engine) *router {
	r := &router{log: log}
	for _, out := range c.Outbound {
		if len(out.Captures) == 0 {
			continue
		}
		e := engineOf(out)
		r.engines = append(r.engines, e)
		for _, text := range out.Captures {
			if d, err := parseDestination(text); err == nil { // as Validate has seen
				r.routes = append(r.routes, route{d, e})
			}
		}
	}
	slices.SortStableFunc(r.routes, func(a, b route) int { return cmp.Compare(b.net.Bits(), a.net.Bits()) })
	return r
}

// find is nil where nothing is meant for to.
func (r *router) find(to netip.AddrPort) hop.Engine {
	for _, each := range r.routes {
		if each.port == to.Port() && each.net.Contains(to.Addr()) {
			return each.engine
		}
	}
	return nil
}

// Serve implements hop.Engine.
func (r *router) Serve(ctx context.Context, conn net.Conn) {
	to, err := meant(conn)
	if err == nil {
		if e := r.find(to); e != nil {
			e.Serve(ctx, conn)
			return
		}
		err = fmt.Errorf("no outbound captures connections to %s", to)
	}
	if now := time.Now().Unix(); r.lastLog.Swap(now) != now {
		r.log.LogAttrs(ctx, slog.LevelWarn, "captured connection refused", slog.Any("err", err),
			slog.String("hint", "add the destination to the captures of an outbound, or leave it out of capture: merlon-sidecar capture install -exclude-net"))
	}
	reset(conn)
}

// below is conn as it was accepted.
func below(conn net.Conn) net.Conn {
	if wrapped, ok := conn.(*sock.Conn); ok {
		return wrapped.NetConn()
	}
	return conn
}

func meant(conn net.Conn) (netip.AddrPort, error) {
	tcp, ok := below(conn).(*net.TCPConn)
	if !ok {
		return netip.AddrPort{}, capture.ErrNotCaptured
	}
	return capture.OriginalDst(tcp)
}

// Close implements hop.Engine.
func (r *router) Close() {
	for _, e := range r.engines {
		e.Close()
	}
}

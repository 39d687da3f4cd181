// Package capture decides which connections of a machine, or of a pod, go through the
// sidecar whether programs know of it or not: what the app connects to goes to the
// sidecar's port for that, what others connect to the app to its port for callers. It
// writes rules for nftables or iptables, of IPv4 and IPv6 alike, in one step each, and
// touches no others. While the sidecar is down, what is captured is refused.
package capture

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Rules say what is captured. The zero value captures nothing, and is refused.
type Rules struct {
	// SidecarUID is whose connections are never captured: the sidecar's, which would
	// meet itself.
	SidecarUID uint32
	// OutboundPort is where the sidecar takes what apps connect to, on 127.0.0.1 and
	// ::1; it finds out by OriginalDst where they wanted to go. Zero: nothing outbound is
	// captured.
	OutboundPort uint16
	// Inbound are the ports of the app that others reach through the sidecar alone.
	Inbound []Inbound
	// AppUIDs are the users whose connections are captured; empty: all of them but the
	// sidecar's and ExcludeUIDs.
	AppUIDs, ExcludeUIDs []uint32
	// ExcludeNets are not captured on the way out.
	ExcludeNets []netip.Prefix
	// UDP is what becomes of the UDP of who is captured, which no sidecar takes.
	UDP UDP
}

// Inbound is a port of the app, and that of the sidecar which callers come to instead.
type Inbound struct{ App, Sidecar uint16 }

// UDP is what becomes of it. What stays on the machine always passes.
type UDP string

// What can become of UDP.
const (
	UDPAllow UDP = "allow" // it goes past the sidecar
	UDPDNS   UDP = "dns"   // all but port 53 is dropped
	UDPDrop  UDP = "drop"  // all is
)

// InvalidError reports rules that are refused.
type InvalidError struct {
	Field, Reason, Hint string
}

// Error names field and reason.
func (e *InvalidError) Error() string { return e.Field + ": " + e.Reason }

// Validate says what is wrong with r, as *InvalidError.
func (r Rules) Validate() error {
	switch {
	case r.OutboundPort == 0 && len(r.Inbound) == 0:
		return &InvalidError{"outbound-port", "is missing, and so is inbound: there is nothing to capture", "-outbound-port 15001, or -inbound 8080:8443"}
	case r.SidecarUID == 0:
		return &InvalidError{"sidecar-user", "is root, whose programs would all go past the sidecar", "run the sidecar as a user of its own"}
	case slices.Contains(r.AppUIDs, r.SidecarUID):
		return &InvalidError{"app-user", "is the sidecar's, so that its own connections would come back to it", "run the sidecar as a user of its own"}
	case r.OutboundPort == 0 && len(r.AppUIDs)+len(r.ExcludeUIDs)+len(r.ExcludeNets) > 0:
		return &InvalidError{"outbound-port", "is missing: the rest is about outbound connections", "-outbound-port 15001"}
	case !slices.Contains([]UDP{UDPAllow, UDPDNS, UDPDrop}, r.UDP):
		return &InvalidError{"udp", fmt.Sprintf("%q is none of allow, dns, drop", r.UDP), ""}
	}
	seen := map[uint16]bool{}
	for _, in := range r.Inbound {
		if in.App == 0 || in.Sidecar == 0 || in.App == in.Sidecar || in.App == r.OutboundPort || in.Sidecar == r.OutboundPort || seen[in.App] {
			return &InvalidError{"inbound", fmt.Sprintf("%d:%d is no pair of ports, or one of them stands elsewhere too", in.App, in.Sidecar), "APP:SIDECAR, such as 8080:8443"}
		}
		seen[in.App] = true
	}
	for _, in := range r.Inbound {
		if seen[in.Sidecar] {
			return &InvalidError{"inbound", fmt.Sprintf("%d is a port of the app and of the sidecar", in.Sidecar), ""}
		}
	}
	for _, net := range r.ExcludeNets {
		if !net.IsValid() || net != net.Masked() {
			return &InvalidError{"exclude-net", fmt.Sprintf("%s is no network, such as 10.0.0.0/8", net), ""}
		}
	}
	return nil
}

// passing are the users whose connections are not captured, sorted. They matter where
// not only some are captured.
func (r Rules) passing() []uint32 {
	all := append(slices.Clone(r.ExcludeUIDs), r.SidecarUID)
	slices.Sort(all)
	return slices.Compact(all)
}

// nets are the excluded networks of IPv4, or of IPv6.
func (r Rules) nets(v6 bool) (all []netip.Prefix) {
	for _, net := range r.ExcludeNets {
		if net.Addr().Is6() == v6 {
			all = append(all, net)
		}
	}
	return all
}

// firewall is one of the kernel's two interfaces to the same thing.
type firewall interface {
	// install puts r in the place of what was installed before, or changes nothing.
	install(ctx context.Context, r Rules) error
	// remove removes what install has made, if anything.
	remove(ctx context.Context) error
	// installed says whether there is anything of that.
	installed(ctx context.Context) (bool, error)
	// missing says in sentences what of r is not in force.
	missing(ctx context.Context, r Rules) ([]string, error)
}

// Backends are the names of what can be used, in the order in which it is tried.
const (
	Auto     = "auto"
	NFTables = "nftables"
	IPTables = "iptables"
)

// ErrMissing says that rules which should be in force are not.
var ErrMissing = errors.New("capture is not in force")

// choose returns the firewall that is called for, and the other one if that is here.
func choose(ctx context.Context, backend string) (name string, chosen, other firewall, err error) {
	nft, nftErr := findNFT(ctx)
	ipt, iptErr := findIPTables(ctx)
	switch {
	case backend == NFTables && nftErr != nil:
		return "", nil, nil, nftErr
	case backend == IPTables && iptErr != nil:
		return "", nil, nil, iptErr
	case backend != Auto && backend != NFTables && backend != IPTables:
		return "", nil, nil, &InvalidError{"backend", fmt.Sprintf("%q is none of auto, nftables, iptables", backend), ""}
	case nftErr != nil && iptErr != nil:
		return "", nil, nil, errors.Join(nftErr, iptErr)
	}
	if nftErr == nil && backend != IPTables {
		if iptErr == nil {
			other = ipt
		}
		return NFTables, nft, other, nil
	}
	if nftErr == nil {
		other = nft
	}
	return IPTables, ipt, other, nil
}

// Install puts r into force in one step, in the place of what was installed before, by
// whichever backend. It returns the one that it took. Connections that exist stay as
// they are, but those of others to the app, which are cut.
func Install(ctx context.Context, backend string, r Rules) (string, error) {
	if err := r.Validate(); err != nil {
		return "", err
	}
	name, chosen, other, err := choose(ctx, backend)
	if err != nil {
		return "", err
	}
	if err := chosen.install(ctx, r); err != nil {
		return "", fmt.Errorf("install capture by %s: %w", name, err)
	}
	if err := removeOther(ctx, other); err != nil {
		return name, fmt.Errorf("capture is installed by %s, and what was installed before is there too: %w", name, err)
	}
	return name, nil
}

func removeOther(ctx context.Context, f firewall) error {
	if f == nil {
		return nil
	}
	if there, err := f.installed(ctx); err != nil || !there {
		return nil // it has nothing that we know of, or does not work here
	}
	return f.remove(ctx)
}

// Remove removes all that Install has made, and nothing else. It is no error if that is
// nothing.
func Remove(ctx context.Context) error {
	_, chosen, other, err := choose(ctx, Auto)
	if err != nil {
		return err
	}
	if err := chosen.remove(ctx); err != nil {
		return fmt.Errorf("remove capture: %w", err)
	}
	if err := removeOther(ctx, other); err != nil {
		return fmt.Errorf("remove capture: %w", err)
	}
	return nil
}

// Check says in sentences what of r is not in force; none means that all is.
func Check(ctx context.Context, backend string, r Rules) ([]string, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	_, chosen, other, err := choose(ctx, backend)
	if err != nil {
		return nil, err
	}
	if backend == Auto && other != nil {
		if there, err := other.installed(ctx); err == nil && there {
			chosen = other
		}
	}
	missing, err := chosen.missing(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("check capture: %w", err)
	}
	return missing, nil
}

// Package sidecar gives a program that cannot link the SDK what the SDK gives: an
// identity, mutual TLS, and a decision about every call. It stands beside the
// program, in front of it for callers and behind it for what it calls, and is itself
// an ordinary program of the SDK: its SPIFFE ID is the app's, and identity,
// decisions, revocation and rotation are the SDK's own code.
package sidecar

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/health"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// Sidecar is one, ready to run.
type Sidecar struct {
	cfg    Config
	log    *slog.Logger
	id     *sdk.Identity
	health *health.Server
	access *accessLog
	opened func([]*door) // called with the listeners; nil but in tests
}

// New checks the settings.
func New(cfg Config) (*Sidecar, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Sidecar{cfg: cfg.withDefaults()}
	var err error
	if s.log, err = s.cfg.logger(); err != nil {
		return nil, err
	}
	s.health = health.New(s.log)
	return s, nil
}

// Run gets the identity, opens the listeners and serves until ctx ends and requests
// under way have finished.
func (s *Sidecar) Run(ctx context.Context) error {
	var err error
	if s.access, err = openAccessLog(s.cfg.AccessLog); err != nil {
		return err
	}
	defer s.access.close()
	if s.id, err = sdk.Open(ctx, s.options()...); err != nil {
		return err
	}
	defer s.id.Close()
	doors, err := s.open(ctx)
	if err != nil {
		return err
	}
	healthListener, err := s.listenHealth(ctx)
	if err != nil {
		closeDoors(doors)
		return err
	}
	if s.opened != nil {
		s.opened(doors)
	}
	s.health.Check("identity", func() error { _, err := s.id.GetX509SVID(); return err })
	var all sync.WaitGroup
	var healthErr error
	if healthListener != nil {
		all.Go(func() { healthErr = s.health.Serve(ctx, healthListener) })
	}
	for _, d := range doors {
		all.Go(func() { d.run(ctx, s.cfg.DrainTimeout) })
		s.log.LogAttrs(ctx, slog.LevelInfo, "listening", slog.String("listener", d.hop.Name), slog.String("direction", string(d.hop.Direction)),
			slog.String("protocol", string(d.hop.Protocol)), slog.String("spiffe_id", s.id.ID().String()))
	}
	all.Wait()
	return healthErr
}

func (s *Sidecar) options() []sdk.Option {
	options := []sdk.Option{sdk.WithLogger(s.log)}
	if s.cfg.AgentSocket != "" {
		options = append(options, sdk.WithAgentAddress(s.cfg.AgentSocket))
	}
	if s.cfg.AgentUID != 0 {
		options = append(options, sdk.WithAgentUID(s.cfg.AgentUID))
	}
	return options
}

// open opens every listener, or none.
func (s *Sidecar) open(ctx context.Context) (doors []*door, err error) {
	for _, in := range s.cfg.Inbound {
		d, err := s.door(ctx, s.inbound(in), in.Protocol, in.Listen)
		if err != nil {
			closeDoors(doors)
			return nil, err
		}
		doors = append(doors, d)
	}
	for _, out := range s.cfg.Outbound {
		d, err := s.door(ctx, s.outbound(out), out.Protocol, out.Listen)
		if err != nil {
			closeDoors(doors)
			return nil, err
		}
		doors = append(doors, d)
	}
	return doors, nil
}

func closeDoors(doors []*door) {
	for _, d := range doors {
		_ = d.lis.Close() // nothing was accepted
	}
}

func (s *Sidecar) door(ctx context.Context, h *hop.Hop, protocol, address string) (*door, error) {
	lis, err := listenOn(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return newDoor(h, engines[protocol], lis, s.cfg.MaxConnections, s.log), nil
}

// inbound is the hop from callers to the app.
func (s *Sidecar) inbound(in Inbound) *hop.Hop {
	h := s.hop(in.Listen, hop.Inbound, in.Protocol)
	h.To = s.id.ID().String()
	network, address := "tcp", in.App
	if path, ok := strings.CutPrefix(in.App, "unix://"); ok {
		network, address = "unix", path
	}
	h.Upstreams = hop.NewUpstreams(&hop.Upstream{Address: in.App, Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}})
	return h
}

// outbound is the hop from the app to a service.
func (s *Sidecar) outbound(out Outbound) *hop.Hop {
	h := s.hop(out.Listen, hop.Outbound, out.Protocol)
	h.To = out.To
	dial := s.id.DialTLS(out.target(), engines[out.Protocol].alpn...)
	var all []*hop.Upstream
	for _, address := range out.Upstreams {
		all = append(all, &hop.Upstream{Address: address, Dial: func(ctx context.Context) (net.Conn, error) { return dial(ctx, "tcp", address) }})
	}
	h.Upstreams = hop.NewUpstreams(all...)
	return h
}

func (s *Sidecar) hop(name string, direction hop.Direction, protocol string) *hop.Hop {
	h := &hop.Hop{
		Name: name, Direction: direction, Protocol: engines[protocol].asks, Identity: s.id, Limits: s.cfg.limits(),
		Strip: func(name string) bool {
			return policy.ClaimsIdentity(name) || slices.Contains(s.cfg.StripHeaders, name)
		},
	}
	h.Record = func(e *hop.Entry) { s.access.write(h, e) }
	return h
}

func (s *Sidecar) listenHealth(ctx context.Context) (net.Listener, error) {
	if s.cfg.HealthAddress == off {
		return nil, nil
	}
	var cfg net.ListenConfig
	lis, err := cfg.Listen(ctx, "tcp", s.cfg.HealthAddress)
	if err != nil {
		return nil, fmt.Errorf("listen on health_address %s: %w", s.cfg.HealthAddress, err)
	}
	return lis, nil
}

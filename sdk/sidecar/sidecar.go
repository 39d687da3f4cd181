// Package sidecar gives a program that cannot link the SDK what the SDK gives: an
// identity, mutual TLS, and a decision about every call. It stands beside the
// program, in front of it for callers and behind it for what it calls, and is itself
// an ordinary program of the SDK: its SPIFFE ID is the app's, and identity,
// decisions, revocation and rotation are the SDK's own code.
package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"

	"merlon.dev/sdk"
	"merlon.dev/sdk/health"
	"merlon.dev/sdk/internal/telemetry"
	"merlon.dev/sdk/otel"
	"merlon.dev/sdk/systemd"
)

// Sidecar is one, ready to run. Its methods are safe for concurrent use.
type Sidecar struct {
	log       *slog.Logger
	id        *sdk.Identity
	health    *health.Server
	metrics   *metrics
	access    *accessLog
	recent    recent
	upstreams *upstreams
	// Command is started once identity and policy are there, and Run ends with it;
	// empty for none.
	Command []string
	opened  func([]*door) // called with the listeners; nil but in tests

	manager   *systemd.Manager // nil: none
	announced atomic.Bool      // to it, that calls are served

	ctx  context.Context // of Run
	stop context.CancelFunc

	mu     sync.Mutex // guards the rest
	cfg    Config
	isOpen bool // once the listeners are
	doors  []*door
	// next are the sockets that a successor gets.
	next map[string]net.Listener
	// accepting are the doors, retiring what serves or has served behind them.
	accepting, retiring sync.WaitGroup
}

// New checks the settings.
func New(cfg Config) (*Sidecar, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Sidecar{cfg: cfg.withDefaults(), next: make(map[string]net.Listener)}
	var err error
	if s.log, err = s.cfg.logger(); err != nil {
		return nil, err
	}
	s.health = health.New(s.log)
	s.metrics = newMetrics(s.health.Registry(), s.cfg.MetricsBySource)
	s.upstreams = &upstreams{sidecar: s, lists: make(map[string]*upstreamList)}
	s.health.Registry().MustRegister(s.upstreams)
	return s, nil
}

// Run gets the identity, opens the listeners, and serves until ctx ends or the
// command does, and requests under way have finished. A sidecar that runs with the
// same admin_socket already hands its sockets over, finishes what it has begun, and
// ends.
func (s *Sidecar) Run(ctx context.Context) error {
	s.ctx, s.stop = context.WithCancel(ctx)
	defer s.stop()
	defer context.AfterFunc(s.ctx, s.manager.Stopping)()
	var err error
	if s.access, err = openAccessLog(s.config().AccessLog); err != nil {
		return err
	}
	defer s.access.close()
	// What is counted for Prometheus goes to OpenTelemetry, too, if it is set up.
	telemetry.Register(func(log *slog.Logger) (stop func()) { return otel.Start(log, s.health.Registry()) })
	if s.id, err = s.identity(); err != nil {
		return err
	}
	defer s.id.Close()
	before, err := askPredecessor(s.ctx, s.config().AdminSocket)
	if err != nil {
		return err
	}
	defer before.close()
	if err := s.open(before); err != nil {
		return err
	}
	before.serving()
	s.ownPaths(true)
	s.announceReady()
	return s.serve()
}

// serve serves until all is over.
func (s *Sidecar) serve() error {
	var all sync.WaitGroup
	errs := make(chan error, 2)
	s.mu.Lock() // a reload may come already
	healthLis, admin, handover := s.next[healthSocket], s.next[adminSocket], s.next[handoverSocket]
	s.mu.Unlock()
	if healthLis != nil {
		all.Go(func() { errs <- s.health.Serve(s.ctx, healthLis) })
	}
	if admin != nil {
		all.Go(func() { s.serveAdmin(admin) })
		all.Go(func() { s.serveSuccessor(handover) })
	}
	all.Go(func() { s.manager.Watch(s.ctx, s.alive) })
	command := s.startCommand()
	<-s.ctx.Done()
	s.accepting.Wait()
	s.retireAll()
	s.upstreams.close()
	s.retiring.Wait()
	err := command.end(s.config().DrainTimeout)
	all.Wait()
	close(errs)
	for each := range errs {
		err = errors.Join(err, each)
	}
	return err
}

func (s *Sidecar) config() Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg
}

// identity waits for one for as long as it can come without anybody's changing what
// this process was told.
func (s *Sidecar) identity() (*sdk.Identity, error) {
	for {
		id, err := sdk.Open(s.ctx, s.options()...)
		var not *sdk.NotReadyError
		if !errors.As(err, &not) || s.ctx.Err() != nil {
			return id, err
		}
		switch not.Reason {
		case sdk.SocketAbsent, sdk.SocketDead, sdk.AgentNotSynced, sdk.NoMatchingEntry, sdk.AgentUnavailable:
			s.log.LogAttrs(s.ctx, slog.LevelWarn, "waiting for an identity", slog.String("reason", string(not.Reason)), slog.Any("err", not.Err), slog.String("hint", not.Hint))
		default:
			return nil, err
		}
	}
}

func (s *Sidecar) options() []sdk.Option {
	cfg := s.config()
	options := []sdk.Option{sdk.WithLogger(s.log)}
	if cfg.AgentSocket != "" {
		options = append(options, sdk.WithAgentAddress(cfg.AgentSocket))
	}
	if cfg.AgentUID != 0 {
		options = append(options, sdk.WithAgentUID(cfg.AgentUID))
	}
	return options
}

// The names of sockets that are no hop's.
const (
	healthSocket   = "health"
	adminSocket    = "admin"
	handoverSocket = "handover"
)

// open opens every listener, or none, and begins to accept.
func (s *Sidecar) open(before *predecessor) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if err != nil {
			for _, lis := range s.next {
				_ = lis.Close() // nothing was accepted
			}
		}
	}()
	for _, p := range s.cfg.plans() {
		if err := s.listen(before, p.address, p.address); err != nil {
			return err
		}
	}
	if s.cfg.HealthAddress != off {
		if err := s.listen(before, healthSocket, s.cfg.HealthAddress); err != nil {
			return fmt.Errorf("health_address: %w", err)
		}
	}
	if s.cfg.AdminSocket != off {
		if err := s.listen(before, adminSocket, "unix://"+s.cfg.AdminSocket); err != nil {
			return fmt.Errorf("admin_socket: %w", err)
		}
		if err := s.listen(before, handoverSocket, "unix://"+s.cfg.AdminSocket+handoverSuffix); err != nil {
			return fmt.Errorf("admin_socket: %w", err)
		}
	}
	s.health.Check("identity", func() error { _, err := s.id.GetX509SVID(); return err })
	s.health.Check("policy", s.policyReady)
	s.health.Check("app", s.upstreams.appReady)
	s.isOpen = true
	for _, p := range s.cfg.plans() {
		s.admit(p)
	}
	if s.opened != nil {
		s.opened(s.doors)
	}
	return nil
}

// policyReady says why calls cannot be decided, where there are listeners that decide.
func (s *Sidecar) policyReady() error {
	if len(s.config().Inbound) == 0 {
		return nil
	}
	return s.id.PolicyReady()
}

// listen takes the socket of a name over, if it listens at address, or opens one there.
func (s *Sidecar) listen(before *predecessor, name, address string) (err error) {
	lis := before.take(name, address)
	if lis == nil {
		if lis, err = listenOn(s.ctx, address); err != nil {
			return fmt.Errorf("listen on %s: %w", address, err)
		}
	}
	s.next[name] = lis
	return nil
}

// admit begins to accept for p, whose listener is open.
func (s *Sidecar) admit(p plan) {
	d := &door{address: p.address, lis: s.next[p.address], log: s.log}
	d.ctx, d.close = context.WithCancel(s.ctx)
	h, e := p.make(s)
	d.serving.Store(newServing(h, e))
	s.doors = append(s.doors, d)
	s.accepting.Go(d.run)
	s.log.LogAttrs(s.ctx, slog.LevelInfo, "listening", slog.String("listener", p.address), slog.String("direction", string(h.Direction)),
		slog.String("protocol", p.protocol), slog.String("destination", h.To), slog.String("spiffe_id", s.id.ID().String()))
}

// retireAll ends what every door serves.
func (s *Sidecar) retireAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.doors {
		s.retire(d.serving.Load())
	}
}

// retire has old end in its own time.
func (s *Sidecar) retire(old *serving) {
	drain := s.cfg.DrainTimeout
	s.retiring.Go(func() { old.retire(drain) })
}

// Reload takes a changed configuration in. What cannot be changed while it runs, or
// not be opened, is an error, and then nothing changes. Requests under way finish as
// they began.
func (s *Sidecar) Reload(cfg Config) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() { s.metrics.reloaded(err) }()
	if err := cfg.Validate(); err != nil {
		return err
	}
	cfg = cfg.withDefaults()
	if err := s.cfg.fixed(&cfg); err != nil {
		return err
	}
	if !s.isOpen { // it waits for an identity, and listens nowhere yet
		s.cfg = cfg
		return nil
	}
	if err := s.access.reopen(); err != nil {
		return err
	}
	var added []plan
	for _, p := range cfg.plans() {
		if s.next[p.address] != nil {
			continue
		}
		if err := s.listen(nil, p.address, p.address); err != nil {
			for _, p := range added {
				_ = s.next[p.address].Close() // nothing was accepted
				delete(s.next, p.address)
			}
			return err
		}
		added = append(added, p)
	}
	s.apply(cfg, added)
	return nil
}

// apply replaces what is served by what cfg says; the listeners of added are open.
func (s *Sidecar) apply(cfg Config, added []plan) {
	s.cfg = cfg
	s.upstreams.next()
	wanted := make(map[string]plan)
	for _, p := range cfg.plans() {
		wanted[p.address] = p
	}
	var kept []*door
	for _, d := range s.doors {
		old := d.serving.Load()
		if p, ok := wanted[d.address]; ok {
			d.serving.Store(newServing(p.make(s)))
			kept = append(kept, d)
		} else {
			d.close()
			delete(s.next, d.address)
		}
		s.retire(old)
	}
	s.doors = kept
	for _, p := range added {
		s.admit(p)
	}
	s.upstreams.prune()
	s.log.LogAttrs(s.ctx, slog.LevelInfo, "configuration reloaded", slog.Int("listeners", len(s.doors)))
}

// fixed says which setting of next differs that only a restart can change.
func (c *Config) fixed(next *Config) error {
	for field, same := range map[string]bool{
		"agent_socket":      c.AgentSocket == next.AgentSocket,
		"agent_uid":         c.AgentUID == next.AgentUID,
		"health_address":    c.HealthAddress == next.HealthAddress,
		"admin_socket":      c.AdminSocket == next.AdminSocket,
		"access_log":        c.AccessLog == next.AccessLog,
		"metrics_by_source": c.MetricsBySource == next.MetricsBySource,
		"log_level":         c.LogLevel == next.LogLevel,
		"log_format":        c.LogFormat == next.LogFormat,
	} {
		if !same {
			return &InvalidError{Field: field, Reason: "cannot change while the sidecar runs", Hint: "start the new one beside it: with the same admin_socket it takes the sockets over"}
		}
	}
	return nil
}

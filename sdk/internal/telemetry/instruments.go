// The instruments, after OpenTelemetry's semantic conventions 1.43 where those
// have one, and the attributes that go with them. The names are spelled out; the tests
// of sdk/otel hold them against the package that has them.

package telemetry

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"merlon.dev/policy"
)

// Merlon's own attributes.
const (
	DecisionKey   = attribute.Key("merlon.decision") // allow, deny or would_deny
	ReasonKey     = attribute.Key("merlon.reason")
	DecisionIDKey = attribute.Key("merlon.decision_id")
	SourceKey     = attribute.Key("merlon.source") // a SPIFFE ID; in metrics only where asked for
	RoleKey       = attribute.Key("merlon.handshake.role")
	OutcomeKey    = attribute.Key("merlon.handshake.outcome")
)

// Outcome is what became of a handshake.
type Outcome string

// The outcomes of a handshake.
const (
	Accepted Outcome = "accepted" // the peer has proved who it is, and may connect
	Refused  Outcome = "refused"  // it has not, or may not
	Failed   Outcome = "failed"   // it came to neither
)

// Role is a side of a handshake.
type Role string

// The sides of a handshake.
const (
	Server Role = "server"
	Client Role = "client"
)

// durations are the buckets that the conventions advise, in seconds.
var durations = []float64{0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}

type instruments struct {
	httpServer, httpClient, rpcServer, rpcClient metric.Float64Histogram
	decisions, handshakes                        metric.Int64Counter
	gauges                                       metric.Registration

	// The attributes of counters, made once. The maps never change.
	decided map[policy.Reason]*[3]metric.MeasurementOption // by verdict
	shaken  map[Role]map[Outcome]metric.MeasurementOption
}

// make creates all instruments. One that the provider refuses does nothing, and
// OpenTelemetry's error handler is told.
func (i *instruments) make(m metric.Meter) {
	histogram := func(name, about string) metric.Float64Histogram {
		return must(m.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(about), metric.WithExplicitBucketBoundaries(durations...)))
	}
	i.httpServer = histogram("http.server.request.duration", "Duration of HTTP server requests.")
	i.httpClient = histogram("http.client.request.duration", "Duration of HTTP client requests.")
	i.rpcServer = histogram("rpc.server.call.duration", "Measures the duration of an incoming Remote Procedure Call (RPC).")
	i.rpcClient = histogram("rpc.client.call.duration", "Measures the duration of an outgoing Remote Procedure Call (RPC).")
	i.decisions = must(m.Int64Counter("merlon.decisions", metric.WithUnit("{decision}"),
		metric.WithDescription("Decisions on calls to this service, by what was done and why.")))
	i.handshakes = must(m.Int64Counter("merlon.handshakes", metric.WithUnit("{handshake}"),
		metric.WithDescription("TLS handshakes, by side and outcome.")))
	i.decided = make(map[policy.Reason]*[3]metric.MeasurementOption)
	for _, r := range policy.Reasons() {
		i.decided[r] = new([3]metric.MeasurementOption)
		for v := range verdicts {
			i.decided[r][v] = metric.WithAttributeSet(attribute.NewSet(DecisionKey.String(verdicts[v]), ReasonKey.String(string(r))))
		}
	}
	i.shaken = make(map[Role]map[Outcome]metric.MeasurementOption)
	for _, role := range []Role{Server, Client} {
		i.shaken[role] = make(map[Outcome]metric.MeasurementOption)
		for _, o := range []Outcome{Accepted, Refused, Failed} {
			i.shaken[role][o] = metric.WithAttributeSet(attribute.NewSet(RoleKey.String(string(role)), OutcomeKey.String(string(o))))
		}
	}
	i.observe(m)
}

// must gives an instrument, which the API never leaves nil.
func must[T any](instrument T, err error) T {
	if err != nil {
		otel.Handle(err)
	}
	return instrument
}

func (i *instruments) stop() {
	if i.gauges != nil {
		if err := i.gauges.Unregister(); err != nil {
			otel.Handle(err)
		}
	}
}

// State is what the gauges show of one identity.
type State struct {
	HasSVID        bool
	SVIDTimeLeft   time.Duration
	HasPolicy      bool
	PolicyAge      time.Duration
	HasRevocations bool
	RevocationsAge time.Duration
	Connections    int64
	Calls          int64
}

var (
	watchedMu sync.Mutex
	watched   []*func() State // guarded by watchedMu
)

// Watch has the gauges show what f says, too, until stop is called.
func Watch(f func() State) (stop func()) {
	watchedMu.Lock()
	defer watchedMu.Unlock()
	watched = append(watched, &f)
	return func() {
		watchedMu.Lock()
		defer watchedMu.Unlock()
		watched = slices.DeleteFunc(watched, func(g *func() State) bool { return g == &f })
	}
}

// observe has the provider ask for the gauges whenever it reads. Of several
// identities in one process the gauges show the worst, and the sum of what they
// have open: no attribute tells them apart.
func (i *instruments) observe(m metric.Meter) {
	seconds := func(name, about string) metric.Float64ObservableGauge {
		return must(m.Float64ObservableGauge(name, metric.WithUnit("s"), metric.WithDescription(about)))
	}
	left := seconds("merlon.x509_svid.time_left", "Time until the X509-SVID of this process expires.")
	policyAge := seconds("merlon.policy.age", "Time since the agent has last confirmed the policy with the CA.")
	revocationsAge := seconds("merlon.revocations.age", "Time since the agent has last confirmed the revocations with the CA.")
	connections := must(m.Int64ObservableUpDownCounter("merlon.connections", metric.WithUnit("{connection}"),
		metric.WithDescription("Live connections whose peer was verified.")))
	calls := must(m.Int64ObservableUpDownCounter("merlon.calls", metric.WithUnit("{call}"),
		metric.WithDescription("Calls to this service that are under way.")))
	i.gauges = must(m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		states := states()
		worst(o, left, states, minimum, func(s State) (time.Duration, bool) { return s.SVIDTimeLeft, s.HasSVID })
		worst(o, policyAge, states, maximum, func(s State) (time.Duration, bool) { return s.PolicyAge, s.HasPolicy })
		worst(o, revocationsAge, states, maximum, func(s State) (time.Duration, bool) { return s.RevocationsAge, s.HasRevocations })
		if len(states) > 0 {
			var open, underWay int64
			for _, s := range states {
				open, underWay = open+s.Connections, underWay+s.Calls
			}
			o.ObserveInt64(connections, open)
			o.ObserveInt64(calls, underWay)
		}
		return nil
	}, left, policyAge, revocationsAge, connections, calls))
}

func states() []State {
	watchedMu.Lock()
	asked := slices.Clone(watched)
	watchedMu.Unlock()
	all := make([]State, len(asked))
	for i, f := range asked {
		all[i] = (*f)()
	}
	return all
}

func minimum(a, b time.Duration) time.Duration { return min(a, b) }
func maximum(a, b time.Duration) time.Duration { return max(a, b) }

// worst shows one value of those that have it; without any the gauge is silent.
func worst(o metric.Observer, g metric.Float64Observable, all []State, of func(a, b time.Duration) time.Duration, value func(State) (time.Duration, bool)) {
	var found time.Duration
	have := false
	for _, s := range all {
		v, ok := value(s)
		switch {
		case ok && have:
			found = of(found, v)
		case ok:
			found, have = v, true
		}
	}
	if have {
		o.ObserveFloat64(g, found.Seconds())
	}
}

// Who keeps what is known of upstreams. A list of upstreams is one, however many
// listeners lead to it and however often the configuration is read again: what its
// checks and requests have found is found once, and stays as long as the list does.

package sidecar

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// upstreams are all lists of a configuration. They are safe for concurrent use.
type upstreams struct {
	sidecar *Sidecar

	mu         sync.Mutex // guards the rest
	lists      map[string]*upstreamList
	generation int // of the configuration
}

// upstreamList is one list, and its checks under way.
type upstreamList struct {
	*hop.Upstreams
	direction  hop.Direction
	to         string
	generation int // that has asked for it last
	stop       context.CancelFunc
	checks     sync.WaitGroup
}

// inbound is the list of the app alone.
func (s *upstreams) inbound(h *hop.Hop, in Inbound) *hop.Upstreams {
	network, address := "tcp", in.App
	if path, ok := strings.CutPrefix(in.App, "unix://"); ok {
		network, address = "unix", path
	}
	in.Listen, in.Limits, in.Timeouts, in.Retry = "", in.Limits.ofUpstreams(), Timeouts{}, in.Retry.ofUpstreams()
	return s.list(fmt.Sprintf("%+v", in), h, in.Protocol, in.behind(), []*hop.Upstream{{Address: in.App, Dial: func(ctx context.Context) (net.Conn, error) {
		return connect(ctx, network, address)
	}}})
}

// outbound is the list of a service's replicas.
func (s *upstreams) outbound(h *hop.Hop, out Outbound) *hop.Upstreams {
	to, alpn := out.target(), engines[out.Protocol].alpn
	var all []*hop.Upstream
	for _, address := range out.Upstreams {
		all = append(all, &hop.Upstream{Address: address, Dial: func(ctx context.Context) (net.Conn, error) { return reach(ctx, h.Identity, to, address, alpn) }})
	}
	out.Listen, out.Captures, out.Limits, out.Timeouts, out.Retry = "", nil, out.Limits.ofUpstreams(), Timeouts{}, out.Retry.ofUpstreams()
	return s.list(fmt.Sprintf("%+v", out), h, out.Protocol, out.behind(), all)
}

// list gives the list of that name, which says all that it is made of, and begins its
// checks where there is none yet.
func (s *upstreams) list(name string, h *hop.Hop, protocol string, set behind, all []*hop.Upstream) *hop.Upstreams {
	s.mu.Lock()
	defer s.mu.Unlock()
	name = string(h.Direction) + name
	if l := s.lists[name]; l != nil {
		l.generation = s.generation
		return l.Upstreams
	}
	for _, u := range all {
		u.MaxConnections, u.MaxRequests = set.limits.UpstreamConnections, set.limits.UpstreamRequests
	}
	l := &upstreamList{Upstreams: hop.NewUpstreams(all...), direction: h.Direction, to: h.To, generation: s.generation}
	l.Budget = set.retry.budget()
	var ctx context.Context
	ctx, l.stop = context.WithCancel(context.Background())
	if set.check.Kind != "" {
		c := set.check.check(protocol)
		for _, u := range all {
			l.checks.Go(func() { c.Run(ctx, u, func(err error) { s.changed(l, u, err) }) })
		}
	}
	s.lists[name] = l
	return l.Upstreams
}

// changed says in the log that u has become healthy, or unhealthy because of err.
func (s *upstreams) changed(l *upstreamList, u *hop.Upstream, err error) {
	log, about := s.sidecar.log, []slog.Attr{slog.String("direction", string(l.direction)), slog.String("destination", l.to), slog.String("upstream", u.Address)}
	ctx := context.Background()
	if err == nil {
		log.LogAttrs(ctx, slog.LevelInfo, "upstream is healthy again", about...)
		return
	}
	log.LogAttrs(ctx, slog.LevelWarn, "upstream is unhealthy", append(about, slog.Any("err", err))...)
	if l.AllUnhealthy() {
		log.LogAttrs(ctx, slog.LevelWarn, "no upstream is healthy: requests go to all of them", about[:2]...)
	}
}

// next begins another configuration: lists that it does not ask for until prune end
// then.
func (s *upstreams) next() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation++
}

func (s *upstreams) prune() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, l := range s.lists {
		if l.generation != s.generation {
			l.stop()
			delete(s.lists, name)
			s.sidecar.retiring.Go(l.checks.Wait)
		}
	}
}

// close ends every check.
func (s *upstreams) close() {
	s.next()
	s.prune()
}

func (s *upstreams) all() (all []*upstreamList) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lists {
		all = append(all, l)
	}
	return all
}

// appReady says why the app behind an inbound hop is not ready, as its checks have it.
func (s *upstreams) appReady() error {
	for _, l := range s.all() {
		if l.direction == hop.Inbound && l.AllUnhealthy() {
			u := l.All()[0]
			return fmt.Errorf("the app at %s is unhealthy: %s", u.Address, u.Checked().Err)
		}
	}
	return nil
}

var (
	upstreamLabels  = []string{"direction", "destination", "upstream"}
	upstreamHealthy = prometheus.NewDesc("merlon_sidecar_upstream_healthy", "1 for an upstream that gets requests; 0 for one that rests after failed requests, or has failed its checks.", upstreamLabels, nil)
	upstreamBusy    = prometheus.NewDesc("merlon_sidecar_upstream_requests", "Requests under way to an upstream; of protocol tcp, connections.", upstreamLabels, nil)
	upstreamRetries = prometheus.NewDesc("merlon_sidecar_retries_total", "Tries beyond a request's first: made, and those that the budget did not allow.", []string{"direction", "destination", "result"}, nil)
	upstreamChecks  = prometheus.NewDesc("merlon_sidecar_health_checks_total", "Checks of an upstream, by outcome.", append(upstreamLabels[:3:3], "result"), nil)
)

// Describe implements prometheus.Collector.
func (s *upstreams) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{upstreamHealthy, upstreamBusy, upstreamChecks, upstreamRetries} {
		to <- d
	}
}

// upstreamSums is what the series of one upstream say, which can be in several lists.
type upstreamSums struct {
	healthy        bool
	requests       int64
	passed, failed int64
}

// Collect implements prometheus.Collector.
func (s *upstreams) Collect(to chan<- prometheus.Metric) {
	sums, retries, now := make(map[[3]string]upstreamSums), make(map[[3]string]int64), time.Now()
	for _, l := range s.all() {
		made, denied := l.Retries()
		retries[[3]string{string(l.direction), l.to, "made"}] += made
		retries[[3]string{string(l.direction), l.to, "over_budget"}] += denied
		for _, u := range l.All() {
			key, checked := [3]string{string(l.direction), l.to, u.Address}, u.Checked()
			have, again := sums[key]
			have.healthy = u.State(now) == hop.Healthy && (have.healthy || !again)
			have.requests += u.Active()
			have.passed += checked.Passed
			have.failed += checked.Failed
			sums[key] = have
		}
	}
	for labels, n := range retries {
		to <- prometheus.MustNewConstMetric(upstreamRetries, prometheus.CounterValue, float64(n), labels[:]...)
	}
	for labels, have := range sums {
		of := labels[:]
		healthy := 0.0
		if have.healthy {
			healthy = 1
		}
		to <- prometheus.MustNewConstMetric(upstreamHealthy, prometheus.GaugeValue, healthy, of...)
		to <- prometheus.MustNewConstMetric(upstreamBusy, prometheus.GaugeValue, float64(have.requests), of...)
		to <- prometheus.MustNewConstMetric(upstreamChecks, prometheus.CounterValue, float64(have.passed), append(of[:3:3], "passed")...)
		to <- prometheus.MustNewConstMetric(upstreamChecks, prometheus.CounterValue, float64(have.failed), append(of[:3:3], "failed")...)
	}
}

// Rate, errors and duration of what goes through each listener, for Prometheus. The
// labels have few values: callers' SPIFFE IDs are one only where that is asked for,
// and paths never.

package sidecar

import (
	"strconv"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// maxSeries bounds the combinations of code, reason and source of one listener; what
// is beyond counts under otherSeries.
const (
	maxSeries   = 2000
	otherSeries = "other"
)

// metrics are those of all listeners.
type metrics struct {
	bySource bool
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	bytes    *prometheus.CounterVec
	failures *prometheus.CounterVec
	reloads  *prometheus.CounterVec
}

func newMetrics(to prometheus.Registerer, bySource bool) *metrics {
	of := []string{"direction", "listener", "destination"}
	m := &metrics{
		bySource: bySource,
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_sidecar_requests_total", Help: "Requests, or connections of protocol tcp, that are over, by answer and by the reason of the decision.",
		}, append(of[:3:3], "protocol", "code", "reason", "source")),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "merlon_sidecar_request_duration_seconds", Help: "How long they took, from the head of the request to the end of the answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 60},
		}, of),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "merlon_sidecar_body_bytes_total", Help: "Bytes of bodies, by which way they went: in is from the caller."}, append(of[:3:3], "way")),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_sidecar_failures_total", Help: "Requests, or connections, that the sidecar itself has answered or ended for another reason than a denial.",
		}, append(of[:3:3], "failure")),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "merlon_sidecar_reloads_total", Help: "Attempts to take a changed configuration in."}, []string{"result"}),
	}
	for _, result := range []string{"taken", "refused"} {
		m.reloads.WithLabelValues(result)
	}
	to.MustRegister(m.requests, m.seconds, m.bytes, m.failures, m.reloads)
	return m
}

// reloaded counts an attempt to take a changed configuration in, and what came of it.
func (m *metrics) reloaded(err error) {
	result := "taken"
	if err != nil {
		result = "refused"
	}
	m.reloads.WithLabelValues(result).Inc()
}

// series are those of one hop, looked up once.
type series struct {
	metrics *metrics
	hop     *hop.Hop
	seconds prometheus.Observer
	in, out prometheus.Counter
	// failures has all of hop.Failures.
	failures map[*hop.Failure]prometheus.Counter

	mu       sync.RWMutex // guards requests
	requests map[seriesKey]prometheus.Counter
}

type seriesKey struct {
	status                     int
	grpcStatus, reason, source string
}

func (m *metrics) of(h *hop.Hop) *series {
	labels := []string{string(h.Direction), h.Name, h.To}
	failures := make(map[*hop.Failure]prometheus.Counter, len(hop.Failures))
	for _, f := range hop.Failures {
		failures[f] = m.failures.WithLabelValues(append(labels[:3:3], f.Reason)...)
	}
	return &series{
		metrics: m, hop: h, failures: failures, requests: make(map[seriesKey]prometheus.Counter),
		seconds: m.seconds.WithLabelValues(labels...),
		in:      m.bytes.WithLabelValues(append(labels[:3:3], "in")...),
		out:     m.bytes.WithLabelValues(append(labels[:3:3], "out")...),
	}
}

// observe counts a request that is over.
func (s *series) observe(e *hop.Entry) {
	key := seriesKey{status: e.Status, grpcStatus: e.GRPCStatus, reason: string(e.Reason)}
	if s.metrics.bySource {
		key.source = e.Source
	}
	s.counter(key).Inc()
	if e.Failure != nil {
		s.count(e.Failure)
	}
	s.seconds.Observe(e.Took.Seconds())
	s.in.Add(float64(e.BytesIn))
	s.out.Add(float64(e.BytesOut))
}

func (s *series) count(f *hop.Failure) { s.failures[f].Inc() }

func (s *series) counter(key seriesKey) prometheus.Counter {
	s.mu.RLock()
	c := s.requests[key]
	s.mu.RUnlock()
	if c != nil {
		return c
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.requests) >= maxSeries {
		key = seriesKey{status: 0, reason: otherSeries}
	}
	if c = s.requests[key]; c == nil {
		code := key.grpcStatus
		if code == "" && key.status != 0 {
			code = strconv.Itoa(key.status)
		}
		c = s.metrics.requests.WithLabelValues(string(s.hop.Direction), s.hop.Name, s.hop.To, string(s.hop.Protocol), code, key.reason, key.source)
		s.requests[key] = c
	}
	return c
}

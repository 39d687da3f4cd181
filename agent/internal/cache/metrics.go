// What Prometheus sees of the node's picture.

package cache

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	issued *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, c *Cache) metrics {
	m := metrics{issued: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "merlon_agent_x509_svids_total",
		Help: "X509-SVIDs asked of the CA for workloads, by result (ok, error).",
	}, []string{"result"})}
	reg.MustRegister(m.issued,
		gauge("merlon_agent_x509_svid_first_expiry_timestamp_seconds", "When the first held X509-SVID ends, in Unix time; 0 without any.",
			func() float64 { return unixSeconds(c.EarliestExpiry()) }),
		gauge("merlon_agent_sync_connected", "1 while the CA's Sync stream is open.",
			func() float64 { return truth(c.State().Connected) }),
		gauge("merlon_agent_sync_stale", "1 while the CA that is followed cannot reach its store, so that no changes arrive.",
			func() float64 { return truth(c.State().Stale) }),
		gauge("merlon_agent_sync_heard_timestamp_seconds", "When the node last held everything that the CA knew, in Unix time; 0 for never.",
			func() float64 { return unixSeconds(c.State().Heard) }),
		gauge("merlon_agent_sync_revision", "Store revision up to which everything is held.",
			func() float64 { return float64(c.State().Revision) }),
		gauge("merlon_agent_entries", "Registration entries of this node.",
			func() float64 { return float64(c.State().Entries) }),
		gauge("merlon_agent_workload_streams", "Open Workload API streams.",
			func() float64 { return float64(c.State().Streams) }),
	)
	return m
}

func gauge(name, help string, value func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
}

func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / 1e9
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

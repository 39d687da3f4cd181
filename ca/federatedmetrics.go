// What Prometheus learns of other trust domains: until when each has a root, since
// trust bundles that were handed over do not renew themselves.

package ca

import (
	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/ca/internal/registry"
)

var federatedEnd = prometheus.NewDesc("merlon_ca_federated_expiry_timestamp_seconds",
	"When the last root in the trust bundle of the other trust domain ends, in Unix time; 0 where it has none.", []string{"trust_domain"}, nil)

// federatedEnds implements prometheus.Collector. It looks when it is asked; there are
// at most trust.MaxFederated.
type federatedEnds struct{ registry *registry.Registry }

// Describe implements prometheus.Collector.
func (f federatedEnds) Describe(to chan<- *prometheus.Desc) { to <- federatedEnd }

// Collect implements prometheus.Collector.
func (f federatedEnds) Collect(to chan<- prometheus.Metric) {
	for _, b := range f.registry.Federated() {
		unix := 0.0
		if end := b.End(); !end.IsZero() {
			unix = float64(end.Unix())
		}
		to <- prometheus.MustNewConstMetric(federatedEnd, prometheus.GaugeValue, unix, b.TrustDomain.Name())
	}
}

// What Prometheus learns of other trust domains: until when each has a root, since
// trust bundles that were handed over do not renew themselves; and how many of its keys
// vouch for a further trust domain, too.

package ca

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/registry"
)

var federatedEnd = prometheus.NewDesc("merlon_ca_federated_expiry_timestamp_seconds",
	"When the last root in the trust bundle of the other trust domain ends, in Unix time; 0 where it has none.", []string{"trust_domain"}, nil)

var federatedShared = prometheus.NewDesc("merlon_ca_federation_shared_keys",
	"Keys in the trust bundle of the other trust domain that are in that of a further one, too.", []string{"trust_domain"}, nil)

// federations implements prometheus.Collector. It looks when it is asked; there are
// at most trust.MaxFederated.
type federations struct{ registry *registry.Registry }

// Describe implements prometheus.Collector.
func (f federations) Describe(to chan<- *prometheus.Desc) {
	to <- federatedEnd
	to <- federatedShared
}

// Collect implements prometheus.Collector.
func (f federations) Collect(to chan<- prometheus.Metric) {
	shared := make(map[spiffeid.TrustDomain]int)
	for _, k := range f.registry.SharedKeys() {
		for _, td := range k.TrustDomains {
			shared[td]++
		}
	}
	for _, b := range f.registry.Federated() {
		unix := 0.0
		if end := b.End(); !end.IsZero() {
			unix = float64(end.Unix())
		}
		to <- prometheus.MustNewConstMetric(federatedEnd, prometheus.GaugeValue, unix, b.TrustDomain.Name())
		to <- prometheus.MustNewConstMetric(federatedShared, prometheus.GaugeValue, float64(shared[b.TrustDomain]), b.TrustDomain.Name())
	}
}

// What Prometheus learns of the keys of the CA: when they end, which steps are to
// come, since when, and for how many they wait. Names are in merlon authority status.

package ca

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/upstream"
)

// watchKeys exports when each authority ends.
func watchKeys(to prometheus.Registerer, keys *upstream.Keys) {
	ends := map[string]func() time.Time{
		"root":         func() time.Time { return keys.X509().Root.NotAfter },
		"intermediate": func() time.Time { return keys.X509().Chain[0].NotAfter },
	}
	for name, end := range ends {
		to.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "merlon_ca_expiry_timestamp_seconds", Help: "When the certificate of the authority ends, in Unix time.",
			ConstLabels: prometheus.Labels{"authority": name},
		}, func() float64 { return float64(end().Unix()) }))
	}
}

var (
	pendingSince = prometheus.NewDesc("merlon_ca_pending_step_since_timestamp_seconds",
		"Since when the authority that waits longest has been in the state before the step, in Unix time.", []string{"kind", "step"}, nil)
	pendingWaits = prometheus.NewDesc("merlon_ca_pending_step_waits",
		"For how many the step waits: agents, replicas that sign under it, silent_replicas.", []string{"kind", "step", "for"}, nil)
)

// pendingSteps implements prometheus.Collector. It looks when it is asked.
type pendingSteps struct{ *authorities }

// Describe implements prometheus.Collector.
func (p pendingSteps) Describe(to chan<- *prometheus.Desc) {
	to <- pendingSince
	to <- pendingWaits
}

// pending is what there is of one kind and step; of several, the most.
type pending struct {
	since                    time.Time
	agents, replicas, silent int
}

// Collect implements prometheus.Collector.
func (p pendingSteps) Collect(to chan<- prometheus.Metric) {
	now := time.Now()
	set, view := p.registry.Rotation(now, p.viewer)
	type place struct {
		kind rotation.Kind
		step rotation.Verb
	}
	all := make(map[place]pending)
	for _, next := range rotation.Waiting(set, view, p.policy, now) {
		a, ok := set.Get(next.ID)
		if !ok {
			continue
		}
		at := place{a.Kind, next.Next}
		most, since := all[at], a.Since[a.State]
		if most.since.IsZero() || since.Before(most.since) {
			most.since = since
		}
		most.agents = max(most.agents, len(next.Wait.Agents))
		most.replicas = max(most.replicas, len(next.Wait.Replicas))
		most.silent = max(most.silent, len(next.Wait.Silent))
		all[at] = most
	}
	for at, most := range all {
		kind, step := string(at.kind), string(at.step)
		to <- prometheus.MustNewConstMetric(pendingSince, prometheus.GaugeValue, float64(most.since.Unix()), kind, step)
		for what, n := range map[string]int{"agents": most.agents, "replicas": most.replicas, "silent_replicas": most.silent} {
			to <- prometheus.MustNewConstMetric(pendingWaits, prometheus.GaugeValue, float64(n), kind, step, what)
		}
	}
}

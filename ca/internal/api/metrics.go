// What Prometheus learns of the service.

package api

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/registry"
)

type metrics struct {
	issued      *prometheus.CounterVec // type, result
	attestation *prometheus.CounterVec // reason
	refused     *prometheus.CounterVec // code
	unrecorded  prometheus.Counter
	rollback    prometheus.Counter
	listings    prometheus.Counter
	pushed      prometheus.Counter
	cloned      prometheus.Counter
	quota       prometheus.Counter
	fetched     *prometheus.CounterVec // federated_trust_domain, result
	// canaryAlarms are the canaries that this replica paused.
	canaryAlarms prometheus.Counter
}

// count counts what is sent to an agent.
func (m *metrics) count(u registry.Update) {
	if u.Reset {
		m.listings.Inc()
	}
	m.pushed.Add(float64(len(u.Entries) + len(u.Removed)))
}

func newMetrics(to prometheus.Registerer, reg *registry.Registry, keys *authority.KeyUse) *metrics {
	m := &metrics{
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_svid_issued_total", Help: "SVIDs asked for, by type (x509, jwt, agent) and result (ok, refused).",
		}, []string{"type", "result"}),
		attestation: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_attestation_failures_total", Help: "Node attestations that were refused, by reason.",
		}, []string{"reason"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_refused_calls_total", Help: "Calls whose caller was not let through, by gRPC code.",
		}, []string{"code"}),
		unrecorded: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_audit_unrecorded_refusals_total", Help: "Refusals of callers without any right that were too many for the audit log, and refusals that it had no room for.",
		}),
		rollback: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_ca_rollback_evidence_total", Help: "Sync calls of agents that have seen more than the store holds: it was put back to an earlier state.",
		}),
		listings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_sync_full_listings_total", Help: "Sync streams that were sent everything that their node may hold, because they could not resume.",
		}),
		cloned: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_ca_cloned_agents_total", Help: "Agents that were evicted because a copy of their X509-SVID was shown.",
		}),
		quota: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_agent_issue_quota_refusals_total", Help: "Calls of agents that were refused because the agent had had its share of SVIDs.",
		}),
		fetched: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "merlon_ca_federation_fetches_total",
			Help: "Fetches of other trust domains' trust bundles, by trust domain and result (ok, unreachable, untrusted, redirect, status, too_large, refused, own_key, older, same_sequence, no_sequence, ended, error).",
		}, []string{"federated_trust_domain", "result"}),
		canaryAlarms: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_policy_canary_alarms_total", Help: "Canaries that this replica took back to shadow because they denied too much.",
		}),
		pushed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "merlon_sync_pushed_entries_total", Help: "Registration entries sent to agents, and removals of entries.",
		}),
	}
	to.MustRegister(m.issued, m.attestation, m.refused, m.unrecorded, m.rollback, m.listings, m.pushed, m.cloned, m.quota, m.fetched, m.canaryAlarms)
	to.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "merlon_ca_forgotten_keys_total", Help: "Public keys that were forgotten before their SVIDs ended, for want of room: their use by another identity would not be noticed.",
	}, func() float64 { return float64(keys.Forgotten()) }))
	counts := []string{"registration_entries", "agents", "revocations", "sync_streams"}
	help := []string{"Registration entries.", "Attested agents.", "Revocation records.", "Open Sync streams."}
	for i, name := range counts {
		to.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "merlon_" + name, Help: help[i]}, func() float64 {
			entries, agents, revocations, streams := reg.Counts()
			return float64([]int{entries, agents, revocations, streams}[i])
		}))
	}
	return m
}

// forget ends the series of a trust domain that is not federated with any more.
func (m *metrics) forget(td spiffeid.TrustDomain) {
	m.fetched.DeletePartialMatch(prometheus.Labels{"federated_trust_domain": td.Name()})
}

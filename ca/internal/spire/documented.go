// Every setting that SPIRE documents and that nothing is made of: why not, or with
// which value it is here as it is there. What is in neither list and not taken is no
// setting of SPIRE's, and called unknown.

package spire

import "strings"

// nothing says, by the beginning of a setting's path, why nothing is made of it.
type nothing []struct{ path, why string }

// about says why nothing is made of path; empty: it is not known.
func (n nothing) about(path string) string {
	for _, k := range n {
		if path == k.path || strings.HasPrefix(path, k.path+".") {
			return k.why
		}
	}
	return ""
}

const (
	noLogFile   = "the log goes to standard error"
	noProfiling = "no profiles are served or written"
	noTelemetry = "metrics are served at health_address, /metrics, and go by OTLP as OTEL_* say"
	noPipe      = "there is no Windows here"
	noTuning    = "nothing is polled or reloaded here: changes are pushed"
	noPQ        = "post-quantum key exchange (X25519MLKEM768) comes first, and is not demanded"
	noBootstrap = "the agent knows the CA by root_hash, and speaks to no other: merlon token create, or merlon trust show, prints it"
	noPusher    = "nothing is pushed; the trust bundle is served at https_address and bundle_endpoint"
	noMore      = "this of it is nothing here: ca/README.md, Nodes"
)

// noServer is what server.conf says that has no equivalent here.
var noServer = nothing{
	{"server.ca_subject", "authorities have subjects of their own, one for each generation"},
	{"server.ca_key_type", "the root's key is ECDSA P-384, the other X.509 authorities' P-256"},
	{"server.jwt_key_type", "JWT keys are ES256 or RS256 (jwt_algorithm)"},
	{"server.disable_jwt_svids", "JWT-SVIDs are there for each entry that has a process that asks"},
	{"server.admin_ids", "give the entry of the workload a role (merlon entry create --role operator), or a token (oidc)"},
	{"server.socket_path", "administrators use admin_socket, /run/merlon/ca/admin.sock"},
	{"server.registration_uds_path", "administrators use admin_socket, /run/merlon/ca/admin.sock"},
	{"server.audit_log_enabled", "the audit log is always written"},
	{"server.ratelimit", "limits are agent_issue_rate, for each agent"},
	{"server.log_file", noLogFile},
	{"server.log_source_location", "log lines do not say where in the program they come from"},
	{"server.profiling_enabled", noProfiling},
	{"server.profiling_freq", noProfiling},
	{"server.profiling_names", noProfiling},
	{"server.profiling_port", noProfiling},
	{"server.proxy_protocol_trusted_cidrs", "the PROXY protocol is not spoken: limits go by agent, not by address"},
	{"server.prune_attested_nodes_expired_for", "agents stay on record, and can be seen (merlon agent list); merlon agent evict takes one out"},
	{"server.prune_attested_nodes_batch_size", "agents stay on record, and can be seen (merlon agent list); merlon agent evict takes one out"},
	{"server.prune_tofu_nodes", "agents stay on record, and can be seen (merlon agent list); merlon agent evict takes one out"},
	{"server.max_attested_node_info_staleness", noTuning},
	{"server.default_svid_ttl", "say x509_svid_ttl and jwt_svid_ttl (SPIRE itself has dropped it)"},
	{"server.upstream_bundle", "with an upstream its root is the trust bundle (SPIRE itself has dropped it)"},
	{"server.omit_x509svid_uid", "SVIDs have no x509UniqueIdentifier"},
	{"server.experimental.auth_opa_policy_engine", "who may do what on the CA is a table: ca/README.md, Administrators; policy for services is merlon policy push"},
	{"server.experimental.agent_spiffe_id_as_selector", "of nodes an alias cannot select one by name: make the agent the parent"},
	{"server.experimental.named_pipe_name", noPipe},
	{"server.experimental.require_pq_kem", noPQ},
	{"server.experimental.wit_issuer", "there are no WIT-SVIDs: the profile is Incubating"},
	{"server.experimental.cache_reload_interval", noTuning},
	{"server.experimental.full_cache_reload_interval", noTuning},
	{"server.experimental.events_based_cache", noTuning},
	{"server.experimental.prune_events_older_than", noTuning},
	{"server.experimental.event_timeout", noTuning},
	{"server.federation.bundle_endpoint.profile.https_web.serving_cert_file.file_sync_interval", "files are read again when they change"},
	{"server.federation.bundle_endpoint.serving_cert_file.file_sync_interval", "files are read again when they change"},
	{"server.federation.bundle_endpoint.address", "no profile says by what it is served: https_web needs acme or serving_cert_file"},
	{"server.federation.bundle_endpoint.port", "no profile says by what it is served: https_web needs acme or serving_cert_file"},
	{"server.federation.bundle_endpoint.profile", "https_web needs acme or serving_cert_file"},
	{"telemetry", noTelemetry},
	{"health_checks", "/live and /ready are at health_address"},
	{"plugins.DataStore", "registrations are in Badger, in data_dir, or for several replicas in etcd (store: etcd)"},
	{"plugins.KeyManager", "keys are sealed files, or in a token or KMS: ca/README.md, Keys"},
	{"plugins.NodeAttestor.aws_iid", "name accounts and the certificates of their regions: node_attestors.aws"},
	{"plugins.NodeAttestor.azure_msi", "name one tenant, an audience of your own and its subscriptions: node_attestors.azure"},
	{"plugins.NodeAttestor.x509pop.plugin_data.agent_path_template", "nodes are named by node_attestors.x509pop.name: public_key, common_name or dns_name"},
	{"plugins.NodeAttestor.x509pop.plugin_data.ca_bundle_paths", "node_attestors.x509pop.ca_file is one file: put the certificates of all into it"},
	{"plugins.NodeAttestor.x509pop.plugin_data.mode", "an SVID of this trust domain makes no node; a CA of its own does (node_attestors.x509pop.ca_file)"},
	{"plugins.NodeAttestor.x509pop", noMore},
	{"plugins.NodeAttestor.gcp_iit", noMore},
	{"plugins.NodeAttestor.k8s_psat", noMore},
	{"plugins.NodeAttestor", "nothing here takes this as proof of a node: ca/README.md, Nodes"},
	{"plugins.NodeResolver", "what is known of a node, its attestor says: ca/README.md, Nodes"},
	{"plugins.UpstreamAuthority.spire", "below another CA of Merlon a CA is nested: upstream: merlon, and merlon token create --kind nested-ca"},
	{"plugins.UpstreamAuthority", "ca/README.md, Upstream authorities, lists who may sign: disk, stepcas, vaultcas, cloudcas"},
	{"plugins.Notifier", noPusher},
	{"plugins.BundlePublisher", noPusher},
	{"plugins.CredentialComposer", "what SVIDs look like is fixed"},
}

// noAgent is what agent.conf says that has no equivalent here.
var noAgent = nothing{
	{"agent.trust_bundle_path", noBootstrap},
	{"agent.trust_bundle_url", noBootstrap},
	{"agent.trust_bundle_unix_socket", noBootstrap},
	{"agent.trust_bundle_spiffe_workload_api", noBootstrap},
	{"agent.trust_bundle_format", noBootstrap},
	{"agent.insecure_bootstrap", noBootstrap},
	{"agent.rebootstrap_mode", "an agent that trusts no CA any more is told the new root_hash by its operator"},
	{"agent.rebootstrap_delay", "an agent that trusts no CA any more is told the new root_hash by its operator"},
	{"agent.join_token", "SPIRE's token is none here: merlon token create, and join_token_file"},
	{"agent.authorized_delegates", "there is no Delegated Identity API"},
	{"agent.allow_unauthenticated_verifiers", "a process without an entry gets no trust bundle"},
	{"agent.allowed_foreign_jwt_claims", "ValidateJWTSVID gives all claims of every JWT-SVID that it accepts"},
	{"agent.availability_target", "X509-SVIDs are renewed at half life: give entries the lifetime that an outage may take"},
	{"agent.x509_svid_cache_max_size", "the SVIDs of processes that run are held, and no others"},
	{"agent.jwt_svid_cache_max_size", "what is held of JWT-SVIDs is bounded by itself"},
	{"agent.workload_x509_svid_key_type", "the agent makes ECDSA P-256 keys; a workload may make its own (--key-delivery workload)"},
	{"agent.disable_sds_api", "Envoy's secrets are always served, to processes that have an entry"},
	{"agent.disable_workload_api", "the Workload API is always served, to processes that have an entry"},
	{"agent.sds", "Envoy's secrets have SPIRE's default names: agent/README.md"},
	{"agent.log_file", noLogFile},
	{"agent.log_selectors", "selectors are not in the log: merlon explain identity shows them to operators"},
	{"agent.log_source_location", "log lines do not say where in the program they come from"},
	{"agent.profiling_enabled", noProfiling},
	{"agent.profiling_freq", noProfiling},
	{"agent.profiling_names", noProfiling},
	{"agent.profiling_port", noProfiling},
	{"agent.experimental.named_pipe_name", noPipe},
	{"agent.experimental.admin_named_pipe_name", noPipe},
	{"agent.experimental.require_pq_kem", noPQ},
	{"agent.experimental.sync_interval", noTuning},
	{"agent.experimental.use_sync_authorized_entries", noTuning},
	{"agent.experimental.jwt_svid_cache_hit_timeout", "a JWT-SVID that is held is given without asking the CA"},
	{"agent.experimental.ratelimit", "each user of the node has a share: agent/README.md"},
	{"agent.experimental.broker", "there is no Broker API: it is Incubating"},
	{"telemetry", noTelemetry},
	{"health_checks", "/live and /ready are at health_address"},
	{"plugins.KeyManager", "the agent's key is sealed in data_dir (key_file, key_credential or key_passphrase_file say under what)"},
	{"plugins.NodeAttestor.x509pop.plugin_data.intermediates_path", "put the intermediates behind the certificate, into node_cert_file"},
	{"plugins.NodeAttestor.x509pop.plugin_data.spiffe_endpoint_socket", "an SVID of this trust domain makes no node"},
	{"plugins.NodeAttestor", "no node proves itself by this here: agent/README.md"},
	{"plugins.WorkloadAttestor.k8s.plugin_data.kubelet_ca_path", "say kubelet_ca_file, beside kubelet_address"},
	{"plugins.WorkloadAttestor.k8s.plugin_data.token_path", "say kubelet_token_file, beside kubelet_address"},
	{"plugins.WorkloadAttestor.k8s.plugin_data.sigstore", "signatures of images are no selectors here"},
	{"plugins.WorkloadAttestor.k8s.plugin_data.experimental", "there is no Broker API: it is Incubating"},
	{"plugins.WorkloadAttestor.k8s", "set kubelet_address, such as NODE:10250; its certificate must be for that host"},
	{"plugins.WorkloadAttestor.docker", "nobody asks Docker here: container:id and container:runtime come from the control group"},
	{"plugins.WorkloadAttestor.unix.plugin_data.workload_size_limit", "a program of at most 512 MiB is hashed, where an entry asks for it"},
	{"plugins.WorkloadAttestor", "nothing here proves this of a process: agent/README.md, Selectors"},
	{"plugins.SVIDStore", "SVIDs are not put into secret stores of clouds"},
}

// asHere are settings that, with this value, say how it is here anyway.
var asHere = map[string]string{
	"server.audit_log_enabled": "true", "server.disable_jwt_svids": "false", "server.log_source_location": "false", "server.profiling_enabled": "false",
	"server.prune_tofu_nodes": "false", "server.omit_x509svid_uid": "true", "server.experimental.require_pq_kem": "false", "server.experimental.agent_spiffe_id_as_selector": "false",
	"plugins.NodeAttestor.x509pop.plugin_data.mode": "external_pki",

	"agent.insecure_bootstrap": "false", "agent.rebootstrap_mode": "never", "agent.allow_unauthenticated_verifiers": "false", "agent.workload_x509_svid_key_type": "ec-p256",
	"agent.disable_sds_api": "false", "agent.disable_workload_api": "false", "agent.log_source_location": "false", "agent.profiling_enabled": "false",
	"agent.sds.default_svid_name": "default", "agent.sds.default_bundle_name": "ROOTCA", "agent.sds.default_all_bundles_name": "ALL", "agent.sds.disable_spiffe_cert_validation": "false",
	"agent.experimental.require_pq_kem": "false",
}

// says whether s says how it is here anyway: by its value, or as a section in which
// nothing is said.
func (s *setting) saysNothing(path string) bool {
	if value, ok := asHere[path]; ok {
		return is(s, value)
	}
	switch path {
	case "server", "agent", "plugins", "telemetry", "health_checks", "server.federation", "server.experimental", "agent.experimental", "agent.sds", "server.ratelimit", "server.ca_subject":
		return len(s.values) == 0
	}
	return false
}

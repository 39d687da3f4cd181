// The command line of merlon-agent: flags win over the environment, the
// environment over the file, the file over the defaults.

package agent

import (
	"errors"
	"io"
	"io/fs"
	"strings"
	"syscall"

	"merlon.dev/sdk/seal"
	"merlon.dev/sdk/settings"
)

const about = `merlon-agent proves one node to the CA and serves the SPIFFE Workload API to the
processes on it.

Example:
  merlon-agent -config /etc/merlon/agent.yaml
`

var program = settings.Program[Config]{
	Name: "merlon-agent", Env: "MERLON_AGENT_", About: about,
	Settings: []settings.Setting[Config]{
		{Key: "trust_domain", Usage: "trust domain `name` of the CA (required)"},
		{Key: "ca_address", Usage: "the CA's gRPC port, as `host:port`; those of its replicas separated by commas (required)"},
		{Key: "ca_https_address", Usage: "the CA's HTTPS port, as `host:port`; for replicas as -ca-address (default: port 8444 on the hosts of -ca-address)"},
		{Key: "data_dir", Usage: "`directory` of what the agent keeps, sealed (default " + DefaultDataDir + ")"},
		{Key: "key_file", Usage: "`file` with the key under which data_dir is sealed, 64 hex digits (default: kek in data_dir, made when missing)"},
		{Key: "key_credential", Usage: "`name` of a systemd credential with that key"},
		{Key: "key_passphrase_file", Usage: "`file` with a passphrase instead of that key"},
		{Key: "cache_keys", Usage: "sealed or never: whether workloads' SVIDs and keys are kept in data_dir (default sealed)"},
		{Key: "public_socket", Usage: "`path` of the Workload API socket (default " + DefaultPublicSocket + ")"},
		{Key: "admin_socket", Usage: "`path` of the admin socket (default " + DefaultAdminSocket + ")"},
		{Key: "join_token", Secret: true},
		{Key: "join_token_file", Usage: "`file` with the join token"},
		{Key: "node_attestor", Usage: "how the node proves itself: join_token, x509pop, k8s, gcp, azure or aws (default join_token)"},
		{Key: "node_cert_file", Usage: "x509pop: `file` with the node's certificate and those above it"},
		{Key: "node_key_file", Usage: "x509pop: `file` with its key"},
		{Key: "k8s_cluster", Usage: "k8s: `name` that the CA has for the cluster"},
		{Key: "k8s_token_file", Usage: "k8s: `file` with the service-account token of the agent's pod"},
		{Key: "node_audience", Usage: "gcp, azure: `audience` of the instance's token, as the CA expects it"},
		{Key: "node_metadata_url", Usage: "gcp, azure, aws: `URL` of the metadata server (default: the cloud's)"},
		{Key: "root_hash", Usage: "`SHA-256` of the CA root's public key, in hex"},
		{Key: "admin_uids", Usage: "`uids`, separated by commas, that may use the admin socket beside root and the agent's own"},
		{Key: "health_address", Usage: "`host:port` of /live, /ready and /metrics, or off (default " + DefaultHealthAddress + ")"},
		{Key: "revocation_max_age", Usage: "`duration` of silence after which revocations are stale (default 5m)"},
		{Key: "on_stale", Usage: "keep or deny: what happens to calls then (default keep)"},
		{Key: "policy_bundle", Usage: "`name` of the policy bundle (default " + DefaultPolicyBundle + ")"},
		{Key: "policy_stale_after", Usage: "`duration` without the CA's word that the policy is the one in force, after which the agent warns (default 1h)"},
		{Key: "policy_max_age", Usage: "`duration` after which that is too long (default 24h)"},
		{Key: "policy_on_stale", Usage: "keep or deny: what happens to calls then (default keep)"},
		{Key: "explain_headers", Usage: "`names`, separated by commas, of request headers whose values merlon explain decision may show (default content-type,user-agent,x-request-id)"},
		{Key: "decision_log_file", Usage: "`file` for the log of decisions, or stdout (default: nowhere)"},
		{Key: "decision_log_max_mib", Usage: "`MiB` that the file becomes before another is begun (default 64)"},
		{Key: "decision_log_keep", Usage: "`number` of older files that are kept (default 4)"},
		{Key: "decision_log_gzip", Usage: "true or false: whether the file is packed (default false)"},
		{Key: "decision_log_upload", Usage: "https `URL` that takes OPA's decision log, or ca for the CA (default: not at all)"},
		{Key: "decision_log_ca_file", Usage: "`file` with the CA of that URL's certificate, in PEM (default: the system's)"},
		{Key: "decision_log_token_file", Usage: "`file` with a bearer token for that URL"},
		{Key: "decision_log_headers", Usage: "`names`, separated by commas, of request headers that the log shows (default: none)"},
		{Key: "decision_log_query", Usage: "`names`, separated by commas, of query parameters that the log shows (default: none)"},
		{Key: "decision_metrics", Usage: "reason or row: what decisions are counted by on the health port (default reason)"},
		{Key: "kubelet_address", Usage: "the HTTPS port of this node's kubelet, as `host:port`, to ask for pods (default: not at all)"},
		{Key: "kubelet_token_file", Usage: "`file` with the bearer token for it (default: the service account's)"},
		{Key: "kubelet_ca_file", Usage: "`file` with the CA of its certificate, in PEM (default: the service account's)"},
		{Key: "log_level", Usage: "debug, info, warn or error (default info)"},
		{Key: "log_format", Usage: "text or json (default text)"},
	},
}

// CommandLine is what merlon-agent was told.
type CommandLine struct {
	Config Config
	// ValidateOnly asks to check the settings and do nothing else.
	ValidateOnly bool
}

// ParseCommandLine reads flags, then the environment, then the file that
// either names, and checks the result. flag.ErrHelp means that help was asked
// for and printed to usage.
func ParseCommandLine(args []string, getenv func(string) string, usage io.Writer) (*CommandLine, error) {
	var cl CommandLine
	line, err := program.Read(&cl.Config, args, getenv, usage)
	if err != nil {
		return nil, err
	}
	if err := program.Unexpected(line); err != nil {
		return nil, err
	}
	cl.ValidateOnly = line.ValidateOnly
	return &cl, cl.Config.Validate()
}

// Hint returns what to do about an error of this package; empty if it says so
// itself.
func Hint(err error) string {
	if hint := settings.Hint(err); hint != "" {
		return hint
	}
	switch text := err.Error(); {
	case errors.Is(err, seal.ErrWrongKey):
		return "set key_file, key_credential or key_passphrase_file to what data_dir was sealed under; if that is lost, move data_dir away and join anew: merlon token create"
	case errors.Is(err, seal.ErrNoKey):
		return "put the key back, or say where it is with key_file, key_credential or key_passphrase_file; if it is lost, move data_dir away and join anew: merlon token create"
	case strings.Contains(text, "another process listens there"):
		return "another merlon-agent serves this node: stop it, or choose other sockets with -public-socket and -admin-socket"
	case errors.Is(err, syscall.EADDRINUSE):
		return "another process has the port: choose another with -health-address"
	case errors.Is(err, fs.ErrPermission), strings.HasPrefix(text, "make the data directory"):
		return "choose folders this user can write: -data-dir, -public-socket and -admin-socket"
	}
	return ""
}

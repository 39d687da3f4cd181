// The command line of merlon-agent: flags win over the environment, the
// environment over the file, the file over the defaults.

package agent

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"
	"syscall"
	"time"

	"merlon.dev/sdk/seal"
)

// envPrefix begins the environment variable of each setting: ca_address is
// MERLON_AGENT_CA_ADDRESS.
const envPrefix = "MERLON_AGENT_"

// setting is one field of Config that flags and environment can set.
type setting struct {
	key   string // as in the file
	usage string
	set   func(c *Config, value string) error
	// secret settings have no flag: everybody can read command lines.
	secret bool
}

func text(field func(*Config) *string) func(*Config, string) error {
	return func(c *Config, v string) error { *field(c) = v; return nil }
}

func addresses(field func(*Config) *Addresses) func(*Config, string) error {
	return func(c *Config, v string) error { return field(c).UnmarshalText([]byte(v)) }
}

var settings = []setting{
	{key: "trust_domain", usage: "trust domain `name` of the CA (required)", set: text(func(c *Config) *string { return &c.TrustDomain })},
	{key: "ca_address", usage: "the CA's gRPC port, as `host:port`; those of its replicas separated by commas (required)", set: addresses(func(c *Config) *Addresses { return &c.CAAddress })},
	{key: "ca_https_address", usage: "the CA's HTTPS port, as `host:port`; for replicas as -ca-address (default: port 8444 on the hosts of -ca-address)", set: addresses(func(c *Config) *Addresses { return &c.CAHTTPSAddress })},
	{key: "data_dir", usage: "`directory` of what the agent keeps, sealed (default " + DefaultDataDir + ")", set: text(func(c *Config) *string { return &c.DataDir })},
	{key: "key_file", usage: "`file` with the key under which data_dir is sealed, 64 hex digits (default: kek in data_dir, made when missing)", set: text(func(c *Config) *string { return &c.KeyFile })},
	{key: "key_credential", usage: "`name` of a systemd credential with that key", set: text(func(c *Config) *string { return &c.KeyCredential })},
	{key: "key_passphrase_file", usage: "`file` with a passphrase instead of that key", set: text(func(c *Config) *string { return &c.KeyPassphraseFile })},
	{key: "cache_keys", usage: "sealed or never: whether workloads' SVIDs and keys are kept in data_dir (default sealed)", set: text(func(c *Config) *string { return &c.CacheKeys })},
	{key: "public_socket", usage: "`path` of the Workload API socket (default " + DefaultPublicSocket + ")", set: text(func(c *Config) *string { return &c.PublicSocket })},
	{key: "admin_socket", usage: "`path` of the admin socket (default " + DefaultAdminSocket + ")", set: text(func(c *Config) *string { return &c.AdminSocket })},
	{key: "join_token", set: text(func(c *Config) *string { return &c.JoinToken }), secret: true},
	{key: "join_token_file", usage: "`file` with the join token", set: text(func(c *Config) *string { return &c.JoinTokenFile })},
	{key: "node_attestor", usage: "how the node proves itself: join_token, x509pop, k8s, gcp, azure or aws (default join_token)", set: text(func(c *Config) *string { return &c.NodeAttestor })},
	{key: "node_cert_file", usage: "x509pop: `file` with the node's certificate and those above it", set: text(func(c *Config) *string { return &c.NodeCertFile })},
	{key: "node_key_file", usage: "x509pop: `file` with its key", set: text(func(c *Config) *string { return &c.NodeKeyFile })},
	{key: "k8s_cluster", usage: "k8s: `name` that the CA has for the cluster", set: text(func(c *Config) *string { return &c.K8sCluster })},
	{key: "k8s_token_file", usage: "k8s: `file` with the service-account token of the agent's pod", set: text(func(c *Config) *string { return &c.K8sTokenFile })},
	{key: "node_audience", usage: "gcp, azure: `audience` of the instance's token, as the CA expects it", set: text(func(c *Config) *string { return &c.NodeAudience })},
	{key: "node_metadata_url", usage: "gcp, azure, aws: `URL` of the metadata server (default: the cloud's)", set: text(func(c *Config) *string { return &c.NodeMetadataURL })},
	{key: "root_hash", usage: "`SHA-256` of the CA root's public key, in hex", set: text(func(c *Config) *string { return &c.RootHash })},
	{key: "admin_uids", usage: "`uids`, separated by commas, that may use the admin socket beside root and the agent's own", set: setAdminUIDs},
	{key: "health_address", usage: "`host:port` of /live, /ready and /metrics, or off (default " + DefaultHealthAddress + ")", set: text(func(c *Config) *string { return &c.HealthAddress })},
	{key: "revocation_max_age", usage: "`duration` of silence after which revocations are stale (default 5m)", set: duration(func(c *Config) *time.Duration { return &c.RevocationMaxAge })},
	{key: "on_stale", usage: "keep or deny: what happens to calls then (default keep)", set: text(func(c *Config) *string { return &c.OnStale })},
	{key: "policy_bundle", usage: "`name` of the policy bundle (default " + DefaultPolicyBundle + ")", set: text(func(c *Config) *string { return &c.PolicyBundle })},
	{key: "policy_stale_after", usage: "`duration` without the CA's word that the policy is the one in force, after which the agent warns (default 1h)", set: duration(func(c *Config) *time.Duration { return &c.PolicyStaleAfter })},
	{key: "policy_max_age", usage: "`duration` after which that is too long (default 24h)", set: duration(func(c *Config) *time.Duration { return &c.PolicyMaxAge })},
	{key: "policy_on_stale", usage: "keep or deny: what happens to calls then (default keep)", set: text(func(c *Config) *string { return &c.PolicyOnStale })},
	{key: "explain_headers", usage: "`names`, separated by commas, of request headers whose values merlon explain decision may show (default content-type,user-agent,x-request-id)", set: setExplainHeaders},
	{key: "decision_log_file", usage: "`file` for the log of decisions, or stdout (default: nowhere)", set: text(func(c *Config) *string { return &c.DecisionLogFile })},
	{key: "decision_log_max_mib", usage: "`MiB` that the file becomes before another is begun (default 64)", set: number(func(c *Config) *int { return &c.DecisionLogMaxMiB })},
	{key: "decision_log_keep", usage: "`number` of older files that are kept (default 4)", set: number(func(c *Config) *int { return &c.DecisionLogKeep })},
	{key: "decision_log_gzip", usage: "true or false: whether the file is packed (default false)", set: setDecisionLogGzip},
	{key: "decision_log_upload", usage: "https `URL` that takes OPA's decision log, or ca for the CA (default: not at all)", set: text(func(c *Config) *string { return &c.DecisionLogUpload })},
	{key: "decision_log_ca_file", usage: "`file` with the CA of that URL's certificate, in PEM (default: the system's)", set: text(func(c *Config) *string { return &c.DecisionLogCAFile })},
	{key: "decision_log_token_file", usage: "`file` with a bearer token for that URL", set: text(func(c *Config) *string { return &c.DecisionLogTokenFile })},
	{key: "decision_log_headers", usage: "`names`, separated by commas, of request headers that the log shows (default: none)", set: list(func(c *Config) *[]string { return &c.DecisionLogHeaders })},
	{key: "decision_log_query", usage: "`names`, separated by commas, of query parameters that the log shows (default: none)", set: list(func(c *Config) *[]string { return &c.DecisionLogQuery })},
	{key: "decision_metrics", usage: "reason or row: what decisions are counted by on the health port (default reason)", set: text(func(c *Config) *string { return &c.DecisionMetrics })},
	{key: "kubelet_address", usage: "the HTTPS port of this node's kubelet, as `host:port`, to ask for pods (default: not at all)", set: text(func(c *Config) *string { return &c.KubeletAddress })},
	{key: "kubelet_token_file", usage: "`file` with the bearer token for it (default: the service account's)", set: text(func(c *Config) *string { return &c.KubeletTokenFile })},
	{key: "kubelet_ca_file", usage: "`file` with the CA of its certificate, in PEM (default: the service account's)", set: text(func(c *Config) *string { return &c.KubeletCAFile })},
	{key: "log_level", usage: "debug, info, warn or error (default info)", set: text(func(c *Config) *string { return &c.LogLevel })},
	{key: "log_format", usage: "text or json (default text)", set: text(func(c *Config) *string { return &c.LogFormat })},
}

func number(field func(*Config) *int) func(*Config, string) error {
	return func(c *Config, v string) (err error) {
		if *field(c), err = strconv.Atoi(v); err != nil {
			return fmt.Errorf("%q is not a number", v)
		}
		return nil
	}
}

func list(field func(*Config) *[]string) func(*Config, string) error {
	return func(c *Config, v string) error {
		*field(c) = nil
		for part := range strings.SplitSeq(v, ",") {
			if part = strings.TrimSpace(part); part != "" {
				*field(c) = append(*field(c), part)
			}
		}
		return nil
	}
}

func setDecisionLogGzip(c *Config, value string) (err error) {
	if c.DecisionLogGzip, err = strconv.ParseBool(value); err != nil {
		return fmt.Errorf("%q is neither true nor false", value)
	}
	return nil
}

func setAdminUIDs(c *Config, value string) error {
	c.AdminUIDs = nil
	for part := range strings.SplitSeq(value, ",") {
		uid, err := strconv.ParseUint(strings.TrimSpace(part), 10, 32)
		if err != nil {
			return fmt.Errorf("%q is not a uid", part)
		}
		c.AdminUIDs = append(c.AdminUIDs, uint32(uid))
	}
	return nil
}

func setExplainHeaders(c *Config, value string) error {
	c.ExplainHeaders = []string{}
	for part := range strings.SplitSeq(value, ",") {
		if name := strings.TrimSpace(part); name != "" {
			c.ExplainHeaders = append(c.ExplainHeaders, name)
		}
	}
	return nil
}

func duration(field func(*Config) *time.Duration) func(*Config, string) error {
	return func(c *Config, value string) (err error) {
		if *field(c), err = time.ParseDuration(value); err != nil {
			return fmt.Errorf("%q is not a duration such as 5m", value)
		}
		return nil
	}
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
	set := flag.NewFlagSet("merlon-agent", flag.ContinueOnError)
	set.SetOutput(io.Discard) // the caller reports mistakes, once
	path := set.String("config", getenv(envPrefix+"CONFIG"), "YAML `file` with the settings")
	validate := set.Bool("validate", false, "check the settings and exit")
	given := map[string]string{}
	for _, s := range settings {
		if !s.secret {
			set.Func(strings.ReplaceAll(s.key, "_", "-"), s.usage, func(v string) error { given[s.key] = v; return nil })
		}
	}
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		printUsage(usage, set)
		return nil, err
	} else if err != nil {
		return nil, &usageError{err.Error()}
	}
	if set.NArg() > 0 {
		return nil, &usageError{fmt.Sprintf("unexpected argument %q", set.Arg(0))}
	}
	cl := &CommandLine{ValidateOnly: *validate}
	if *path != "" {
		var err error
		if cl.Config, err = ReadConfig(*path); err != nil {
			return nil, err
		}
	}
	for _, s := range settings {
		name := envPrefix + strings.ToUpper(s.key)
		value, source := getenv(name), name
		if v, ok := given[s.key]; ok {
			value, source = v, "-"+strings.ReplaceAll(s.key, "_", "-")
		} else if value == "" {
			continue
		}
		if err := s.set(&cl.Config, value); err != nil {
			return nil, fmt.Errorf("%s: %w", source, err)
		}
	}
	return cl, cl.Config.Validate()
}

func printUsage(w io.Writer, set *flag.FlagSet) {
	fmt.Fprintf(w, `merlon-agent proves one node to the CA and serves the SPIFFE Workload API to the
processes on it.

Example:
  merlon-agent -config /etc/merlon/agent.yaml

Each setting can also come from %sNAME in the environment.

Flags:
`, envPrefix)
	set.SetOutput(w)
	set.PrintDefaults()
}

// usageError is a mistake in the command line itself.
type usageError struct{ reason string }

func (e *usageError) Error() string { return e.reason }

// Hint returns what to do about an error of this package; empty if it says so
// itself.
func Hint(err error) string {
	if e, ok := errors.AsType[*InvalidError](err); ok {
		return e.Hint
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return "merlon-agent -h shows every flag and an example"
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
	case strings.HasPrefix(text, "read config: open"):
		return "name the file with -config, or give the settings as flags: merlon-agent -h"
	case errors.Is(err, fs.ErrPermission), strings.HasPrefix(text, "make the data directory"):
		return "choose folders this user can write: -data-dir, -public-socket and -admin-socket"
	}
	return ""
}

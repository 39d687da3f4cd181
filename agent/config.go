// What the agent reads at start: a YAML file, the environment, flags.

package agent

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/agent/internal/kubelet"
	"merlon.dev/sdk/settings"
	"merlon.dev/sdk/unixsock"
)

// Config is what the agent reads at start. The zero value of every optional
// field is safe.
type Config struct {
	// TrustDomain is the trust domain of the CA, e.g. "example.org". Required.
	TrustDomain string `yaml:"trust_domain"`

	// CAAddress is the CA's gRPC port, e.g. "ca.example.org:8443", or that of
	// each of its replicas: the agent follows one of them, chosen at random,
	// and goes to another when that one fails. Required.
	CAAddress Addresses `yaml:"ca_address"`

	// CAHTTPSAddress is the CA's HTTPS port, from which policy bundles come:
	// one for each address of ca_address in the same order, or one for all.
	// Empty means the hosts of ca_address and port 8444.
	CAHTTPSAddress Addresses `yaml:"ca_https_address"`

	// DataDir keeps across restarts, sealed, the agent's own SVID with its key
	// and what it serves: entries, SVIDs, trust bundle, policy bundle and
	// revocations. It belongs to the agent's user alone
	// (mode 0700). Empty means /var/lib/merlon/agent.
	DataDir string `yaml:"data_dir"`

	// KeyFile, KeyCredential and KeyPassphraseFile say under what everything in
	// DataDir is sealed: a file with 64 hex digits, the name of a systemd
	// credential that holds the same, or a file with a passphrase. At most one.
	// Without any it is the file kek in DataDir, which is made at the first
	// start, and protects nothing from who can read DataDir.
	KeyFile           string `yaml:"key_file"`
	KeyCredential     string `yaml:"key_credential"`
	KeyPassphraseFile string `yaml:"key_passphrase_file"`

	// CacheKeys says whether the workloads' SVIDs and keys are kept in DataDir:
	// "sealed" keeps them, so that an agent which is restarted while the CA is
	// away serves them again; "never" does not. Empty means sealed.
	CacheKeys string `yaml:"cache_keys"`

	// PublicSocket is the Unix socket of the SPIFFE Workload API, for every
	// user of the node. Empty means /run/merlon/agent/public/api.sock.
	PublicSocket string `yaml:"public_socket"`

	// AdminSocket is the Unix socket of explanations, for operators. Empty
	// means /run/merlon/agent/admin/admin.sock.
	AdminSocket string `yaml:"admin_socket"`

	// NodeAttestor is how the node proves itself to the CA: join_token, x509pop, k8s, gcp,
	// azure, aws. Empty means join_token. What proves it is read at each attempt; with
	// x509pop and k8s the agent attests again by itself whenever it has to.
	NodeAttestor string `yaml:"node_attestor"`

	// JoinToken proves the node once, as `merlon token create` printed it. It
	// is a secret: prefer join_token_file. An agent that has an SVID of its
	// own needs none.
	JoinToken string `yaml:"join_token"`

	// JoinTokenFile is a file with the join token. It is read again at each
	// attempt to join.
	JoinTokenFile string `yaml:"join_token_file"`

	// NodeCertFile is, for x509pop, the node's certificate in PEM, followed by those
	// between it and the root that the CA has configured; NodeKeyFile is its key.
	NodeCertFile string `yaml:"node_cert_file"`
	NodeKeyFile  string `yaml:"node_key_file"`

	// K8sCluster is, for k8s, the name that the CA has for the cluster, and
	// K8sTokenFile where the agent's pod finds its projected service-account token.
	K8sCluster   string `yaml:"k8s_cluster"`
	K8sTokenFile string `yaml:"k8s_token_file"`

	// NodeAudience is, for gcp and azure, whom the instance's token is for, as the CA
	// has it configured.
	NodeAudience string `yaml:"node_audience"`

	// NodeMetadataURL is the metadata server of the cloud, http://host. Empty means
	// the cloud's own.
	NodeMetadataURL string `yaml:"node_metadata_url"`

	// RootHash is the SHA-256 of the CA root's public key in hex, as `merlon
	// token create` and `merlon trust show` print it. The agent sends what proves
	// the node to no CA without this root. Required with a join token and with any
	// other node_attestor.
	RootHash string `yaml:"root_hash"`

	// AdminUIDs are users that may use the admin socket, besides root and the
	// agent's own user.
	AdminUIDs []uint32 `yaml:"admin_uids"`

	// HealthAddress serves /live, /ready and /metrics over plain HTTP. Empty
	// means 127.0.0.1:9444; "off" means not at all.
	HealthAddress string `yaml:"health_address"`

	// RevocationMaxAge is how long the CA may be silent before the held
	// revocations count as stale. Zero means 5m; less than 30s is refused,
	// because the CA speaks every 15 s only.
	RevocationMaxAge time.Duration `yaml:"revocation_max_age"`

	// OnStale says what happens to calls then: "keep" decides by what is
	// known, "deny" denies them with reason STALE_REVOCATIONS. Empty means
	// keep.
	OnStale string `yaml:"on_stale"`

	// PolicyBundle is the name of the policy bundle to follow. Empty means
	// main.
	PolicyBundle string `yaml:"policy_bundle"`

	// PolicyStaleAfter is after how long without the CA's word that the policy in
	// use is the one in force the agent warns. Zero means 1h.
	PolicyStaleAfter time.Duration `yaml:"policy_stale_after"`

	// PolicyMaxAge is after how long that counts as too long. Zero means 24h; less
	// than 30s, or than PolicyStaleAfter, is refused.
	PolicyMaxAge time.Duration `yaml:"policy_max_age"`

	// PolicyOnStale says what happens to calls then: "keep" decides by the policy in
	// use, "deny" denies them with reason STALE_POLICY. Empty means keep.
	PolicyOnStale string `yaml:"policy_on_stale"`

	// ExplainHeaders names the request headers, in lower case, whose values are
	// kept in memory with the last decisions, for `merlon explain decision`; of
	// all others the names alone are. Nil means content-type, user-agent and
	// x-request-id. List here what the policy reads, unless it is a secret.
	ExplainHeaders []string `yaml:"explain_headers"`

	// DecisionLogFile is where decisions are written down, one event of OPA's
	// decision log a line: an absolute path, or "stdout". Empty means nowhere.
	DecisionLogFile string `yaml:"decision_log_file"`

	// DecisionLogMaxMiB is how large the file becomes, and DecisionLogKeep how many
	// older ones are kept beside it, as FILE.1 and so on. Zero means 64, and 4.
	DecisionLogMaxMiB int `yaml:"decision_log_max_mib"`
	DecisionLogKeep   int `yaml:"decision_log_keep"`

	// DecisionLogGzip packs what is written to the file.
	DecisionLogGzip bool `yaml:"decision_log_gzip"`

	// DecisionLogUpload sends the same events in OPA's form to an https URL, or with
	// "ca" to the CA, as this agent. Empty means not at all.
	DecisionLogUpload string `yaml:"decision_log_upload"`

	// DecisionLogCAFile holds the certificates, in PEM, that the URL's must chain to,
	// and DecisionLogTokenFile a bearer token for it, read for each upload. Empty
	// means those that the system trusts, and none.
	DecisionLogCAFile    string `yaml:"decision_log_ca_file"`
	DecisionLogTokenFile string `yaml:"decision_log_token_file"`

	// DecisionLogHeaders and DecisionLogQuery name the request headers, in lower
	// case, and the parameters of queries that the log shows. All others never appear
	// in it. Empty means none.
	DecisionLogHeaders []string `yaml:"decision_log_headers"`
	DecisionLogQuery   []string `yaml:"decision_log_query"`

	// DecisionMetrics says how decisions are counted on the health port: by "reason",
	// or by "row", which is source, destination, rule and reason. Empty means reason.
	DecisionMetrics string `yaml:"decision_metrics"`

	// KubeletAddress is the HTTPS port of this node's kubelet, as host:port; its
	// certificate must be for that host. The kubelet says whose container is
	// whose, for selectors such as k8s:ns and k8s:pod-label. Empty means not to
	// ask.
	KubeletAddress string `yaml:"kubelet_address"`

	// KubeletTokenFile holds the bearer token for the kubelet, of a service
	// account that may get nodes/proxy. It is read again for each request. Empty
	// means the token that Kubernetes gives the agent's pod.
	KubeletTokenFile string `yaml:"kubelet_token_file"`

	// KubeletCAFile holds the certificates, in PEM, that the kubelet's must chain
	// to. Empty means the CA that Kubernetes names to the agent's pod.
	KubeletCAFile string `yaml:"kubelet_ca_file"`

	// LogLevel is debug, info, warn or error. Empty means info.
	LogLevel string `yaml:"log_level"`

	// LogFormat is text or json. Empty means text.
	LogFormat string `yaml:"log_format"`

	// Supervised says that this process is the agent's alone: what systemd passes
	// to it, such as sockets, is taken, and systemd is told how it fares.
	Supervised bool `yaml:"-"`

	// Logger receives the log, for programs that run the agent in process.
	// Nil logs to stderr by LogLevel and LogFormat.
	Logger *slog.Logger `yaml:"-"`
}

// The default places.
const (
	DefaultDataDir       = "/var/lib/merlon/agent"
	DefaultPublicSocket  = "/run/merlon/agent/public/api.sock"
	DefaultAdminSocket   = "/run/merlon/agent/admin/admin.sock"
	DefaultHealthAddress = "127.0.0.1:9444"
	DefaultPolicyBundle  = "main"
)

const (
	defaultHTTPSPort        = "8444"
	defaultRevocationMaxAge = 5 * time.Minute
	minRevocationMaxAge     = 30 * time.Second
	defaultPolicyStaleAfter = time.Hour
	defaultPolicyMaxAge     = 24 * time.Hour

	healthOff = "off"
	onKeep    = "keep"
	onDeny    = "deny"

	keysSealed = "sealed"
	keysNever  = "never"
)

// InvalidError reports a setting that the agent refuses.
type InvalidError = settings.InvalidError

// withDefaults fills what is empty.
func (c Config) withDefaults() Config {
	set := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	set(&c.DataDir, DefaultDataDir)
	set(&c.PublicSocket, DefaultPublicSocket)
	set(&c.AdminSocket, DefaultAdminSocket)
	set(&c.HealthAddress, DefaultHealthAddress)
	set(&c.PolicyBundle, DefaultPolicyBundle)
	set(&c.OnStale, onKeep)
	set(&c.PolicyOnStale, onKeep)
	set(&c.DecisionMetrics, byReason)
	if c.DecisionLogMaxMiB == 0 {
		c.DecisionLogMaxMiB = defaultDecisionLogMiB
	}
	if c.DecisionLogKeep == 0 {
		c.DecisionLogKeep = defaultDecisionLogKeep
	}
	set(&c.CacheKeys, keysSealed)
	set(&c.NodeAttestor, byJoinToken)
	if c.KubeletAddress != "" {
		set(&c.KubeletTokenFile, kubelet.DefaultTokenFile)
		set(&c.KubeletCAFile, kubelet.DefaultCAFile)
	}
	set(&c.LogLevel, "info")
	set(&c.LogFormat, "text")
	if len(c.CAHTTPSAddress) == 0 {
		c.CAHTTPSAddress = c.CAAddress.onPort(defaultHTTPSPort)
	}
	if c.RevocationMaxAge == 0 {
		c.RevocationMaxAge = defaultRevocationMaxAge
	}
	if c.PolicyMaxAge == 0 {
		c.PolicyMaxAge = max(defaultPolicyMaxAge, c.PolicyStaleAfter)
	}
	if c.PolicyStaleAfter == 0 {
		c.PolicyStaleAfter = min(defaultPolicyStaleAfter, c.PolicyMaxAge)
	}
	if c.ExplainHeaders == nil {
		c.ExplainHeaders = []string{"content-type", "user-agent", "x-request-id"}
	}
	return c
}

// Validate says what is wrong with the settings, as *InvalidError.
func (c Config) Validate() error {
	c = c.withDefaults()
	switch {
	case c.TrustDomain == "":
		return &InvalidError{Field: "trust_domain", Reason: "is missing", Hint: "merlon-agent -trust-domain example.org, or trust_domain in the file of -config"}
	case len(c.CAAddress) == 0 || len(c.CAAddress) == 1 && c.CAAddress[0] == "":
		return &InvalidError{Field: "ca_address", Reason: "is missing", Hint: "merlon-agent -ca-address ca.example.org:8443, or ca_address in the file of -config"}
	}
	if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil || strings.Contains(c.TrustDomain, "/") {
		return &InvalidError{Field: "trust_domain", Reason: fmt.Sprintf("%q is not a trust domain name such as example.org", c.TrustDomain)}
	}
	if err := c.checkAddresses(); err != nil {
		return err
	}
	if err := checkAddress("health_address", c.HealthAddress); err != nil {
		return err
	}
	if err := c.checkPlaces(); err != nil {
		return err
	}
	if err := c.checkEvidence(); err != nil {
		return err
	}
	if err := c.checkKey(); err != nil {
		return err
	}
	if err := c.checkKubelet(); err != nil {
		return err
	}
	return c.checkChoices()
}

func (c Config) checkKey() error {
	given := 0
	for _, source := range []string{c.KeyFile, c.KeyCredential, c.KeyPassphraseFile} {
		if source != "" {
			given++
		}
	}
	if given > 1 {
		return &InvalidError{Field: "key_file", Reason: "of key_file, key_credential and key_passphrase_file at most one says under what data_dir is sealed"}
	}
	if strings.Contains(c.KeyCredential, "/") {
		return &InvalidError{Field: "key_credential", Reason: fmt.Sprintf("%q is not the name of a credential", c.KeyCredential), Hint: "for a path use key_file"}
	}
	return nil
}

func (c Config) checkPlaces() error {
	for _, f := range []struct{ field, value string }{
		{"data_dir", c.DataDir}, {"public_socket", c.PublicSocket}, {"admin_socket", c.AdminSocket},
	} {
		if !filepath.IsAbs(f.value) {
			return &InvalidError{Field: f.field, Reason: fmt.Sprintf("%q is not an absolute path", f.value)}
		}
		if f.field != "data_dir" && len(f.value) > unixsock.MaxPath {
			return &InvalidError{
				Field: f.field, Reason: fmt.Sprintf("has %d bytes, a socket path at most %d", len(f.value), unixsock.MaxPath),
				Hint: "choose a shorter folder",
			}
		}
	}
	// The public directory is open to all users, the admin directory to none.
	if filepath.Dir(c.PublicSocket) == filepath.Dir(c.AdminSocket) {
		return &InvalidError{Field: "admin_socket", Reason: "is in the directory of public_socket, which every user can enter"}
	}
	return nil
}

func (c Config) checkKubelet() error {
	if c.KubeletAddress == "" {
		for field, value := range map[string]string{"kubelet_token_file": c.KubeletTokenFile, "kubelet_ca_file": c.KubeletCAFile} {
			if value != "" {
				return &InvalidError{Field: field, Reason: "is of no use without kubelet_address", Hint: "kubelet_address: NODE:10250 lets the agent ask the kubelet"}
			}
		}
		return nil
	}
	return checkAddress("kubelet_address", c.KubeletAddress)
}

func (c Config) checkPolicyAge() error {
	switch {
	case c.PolicyStaleAfter < minRevocationMaxAge:
		return &InvalidError{Field: "policy_stale_after", Reason: fmt.Sprintf("%v is less than %v", c.PolicyStaleAfter, minRevocationMaxAge)}
	case c.PolicyMaxAge < c.PolicyStaleAfter:
		return &InvalidError{Field: "policy_max_age", Reason: fmt.Sprintf("%v is less than policy_stale_after, %v", c.PolicyMaxAge, c.PolicyStaleAfter)}
	case c.PolicyOnStale != onKeep && c.PolicyOnStale != onDeny:
		return &InvalidError{Field: "policy_on_stale", Reason: fmt.Sprintf("%q is neither keep nor deny", c.PolicyOnStale)}
	}
	return nil
}

func (c Config) checkChoices() error {
	if c.RevocationMaxAge < minRevocationMaxAge {
		return &InvalidError{Field: "revocation_max_age", Reason: fmt.Sprintf("%v is less than %v", c.RevocationMaxAge, minRevocationMaxAge)}
	}
	if c.OnStale != onKeep && c.OnStale != onDeny {
		return &InvalidError{Field: "on_stale", Reason: fmt.Sprintf("%q is neither keep nor deny", c.OnStale)}
	}
	if err := c.checkPolicyAge(); err != nil {
		return err
	}
	if c.CacheKeys != keysSealed && c.CacheKeys != keysNever {
		return &InvalidError{Field: "cache_keys", Reason: fmt.Sprintf("%q is neither sealed nor never", c.CacheKeys)}
	}
	if strings.ContainsAny(c.PolicyBundle, "/?#%") || c.PolicyBundle == "." || c.PolicyBundle == ".." {
		return &InvalidError{Field: "policy_bundle", Reason: fmt.Sprintf("%q is not the name of a policy bundle", c.PolicyBundle)}
	}
	if err := checkHeaderNames("explain_headers", c.ExplainHeaders); err != nil {
		return err
	}
	if err := c.checkDecisionLog(); err != nil {
		return err
	}
	if _, err := c.logger(); err != nil {
		return err
	}
	return nil
}

// logger is where the log goes.
func (c Config) logger() (*slog.Logger, error) {
	if c.Logger != nil {
		return c.Logger, nil
	}
	return settings.NewLogger(os.Stderr, c.LogLevel, c.LogFormat)
}

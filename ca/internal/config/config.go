// Package config is what merlon-ca can be told: every setting with its default, how
// it is read and what is refused, and what the parts of the CA make of it. It opens
// files that settings name, and nothing else.
package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"google.golang.org/grpc"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/settings"
	"merlon.dev/sdk/unixsock"
)

// Defaults of Config.
const (
	DefaultDataDir       = "/var/lib/merlon/ca"
	DefaultAddress       = ":8443"
	DefaultHTTPSAddress  = ":8444"
	DefaultHealthAddress = "127.0.0.1:9443"
	DefaultReplicaName   = "ca"
	DefaultAdminSocket   = "/run/merlon/ca/admin.sock"
	DefaultX509SVIDTTL   = time.Hour
	DefaultJWTSVIDTTL    = 5 * time.Minute
	DefaultAgentSVIDTTL  = time.Hour
	// DefaultAgentIssueRate is more than the workloads of a node use. A thief who uses
	// all of it fills some 4 GB of the audit log in a day.
	DefaultAgentIssueRate = 100
	minAgentIssueRate     = 10 // a minute's worth has room for the largest call
	maxAgentIssueRate     = 1_000_000
	// DefaultJWTMaxAudiences is what the standard advises.
	DefaultJWTMaxAudiences = 1
	DefaultJWTKeyTTL       = 30 * 24 * time.Hour
	// DefaultDiskReserveMiB is in MiB.
	DefaultDiskReserveMiB = 256
	DefaultIssuanceLog    = "strict"
	DefaultAuditMaxAge    = 7 * 24 * time.Hour
	DefaultAuditMaxMiB    = 10 << 10

	DefaultDecisionLogMaxMiB = 64
	DefaultDecisionLogKeep   = 4
)

// Config is what the CA reads at start. The zero value of every optional field
// is safe.
type Config struct {
	// TrustDomain is the name under which every SPIFFE ID is issued, e.g.
	// "example.org". Required; changing it later orphans every SVID, so a data
	// directory of another trust domain is refused.
	TrustDomain string `yaml:"trust_domain"`

	// DataDir holds the store, the keys and the audit log. It is made with mode
	// 0700. Default: /var/lib/merlon/ca.
	DataDir string `yaml:"data_dir"`

	// Store says where registrations are kept: "badger", in data_dir, or "etcd",
	// for a CA of more than one replica. Default: badger.
	Store string `yaml:"store"`

	// DiskReserveMiB is how much of the disk below data_dir stays free: with
	// less, the CA writes nothing but what issuance has set aside, until there
	// is space again. Default: 256.
	DiskReserveMiB int `yaml:"disk_reserve_mib"`

	// IssuanceLog is strict, an SVID leaves once its record is on disk, or async,
	// without waiting for that: a crash can take the records of the batch under
	// way. Default: strict.
	IssuanceLog string `yaml:"issuance_log"`

	// AuditMaxAge and AuditMaxMiB are how long, and how many MiB of, audit
	// records are kept. At least 24h, for as long as an SVID lives, and 64.
	// Default: 168h and 10240.
	AuditMaxAge time.Duration `yaml:"audit_max_age"`
	AuditMaxMiB int           `yaml:"audit_max_mib"`

	// DecisionLogFile is where the decision logs are kept that agents and OPAs
	// upload, one event a line: an absolute path. Empty: they are counted and
	// dropped. DecisionLogMaxMiB is how large the file becomes, and DecisionLogKeep
	// how many older ones stay, as FILE.1 and so on. Default: 64 and 4.
	DecisionLogFile   string `yaml:"decision_log_file"`
	DecisionLogMaxMiB int    `yaml:"decision_log_max_mib"`
	DecisionLogKeep   int    `yaml:"decision_log_keep"`

	// EtcdEndpoints are the client URLs of etcd's members,
	// https://host:2379. Required with store: etcd. Plain http is for loopback
	// only.
	EtcdEndpoints []string `yaml:"etcd_endpoints"`

	// EtcdCAFile, EtcdCertFile and EtcdKeyFile are PEM files of mutual TLS to
	// etcd: the CA of its members, and our certificate with its key.
	EtcdCAFile   string `yaml:"etcd_ca_file"`
	EtcdCertFile string `yaml:"etcd_cert_file"`
	EtcdKeyFile  string `yaml:"etcd_key_file"`

	// EtcdPrefix begins all keys in etcd. Default: /merlon/.
	EtcdPrefix string `yaml:"etcd_prefix"`

	// ReplicaName is this replica's name among the CA's replicas. It is fixed
	// when the replica joins. Default: "ca" on the replica that makes the root,
	// and the name in the join token on others.
	ReplicaName string `yaml:"replica_name"`

	// JoinAddress is the gRPC address of the replica that holds the root key,
	// host:port. It makes this CA a replica of that one: it has its
	// intermediate signed there, now and before each ends, and makes no root of
	// its own. Needs store: etcd.
	JoinAddress string `yaml:"join_address"`

	// JoinToken admits this replica, or nested CA, once, as `merlon token create
	// --kind replica` or nested-ca printed it. It is a secret: prefer
	// join_token_file.
	JoinToken string `yaml:"join_token"`

	// JoinTokenFile is a file with the join token.
	JoinTokenFile string `yaml:"join_token_file"`

	// RootHash is the SHA-256 of the root's public key in hex, printed with the
	// token: the token goes to no CA without this root. Required with a token.
	RootHash string `yaml:"root_hash"`

	// KeyFile holds the key-encryption key under which the CA's private keys lie
	// in data_dir/keys: 64 hex digits, as `openssl rand -hex 32` prints them.
	// Default: data_dir/kek, which is made on the first start.
	KeyFile string `yaml:"key_file"`

	// KeyCredential is the name of a systemd credential (LoadCredential= or
	// LoadCredentialEncrypted=) that holds the key-encryption key, as KeyFile
	// does.
	KeyCredential string `yaml:"key_credential"`

	// KeyPassphraseFile holds a passphrase of which the key-encryption key is
	// made, by scrypt.
	KeyPassphraseFile string `yaml:"key_passphrase_file"`

	// KMS is the URI of a key management service that makes and holds private
	// keys, such as pkcs11:module-path=/usr/lib/softhsm/libsofthsm2.so;token=merlon?pin-source=/etc/merlon/pin.
	// Default: none, keys are sealed files.
	KMS string `yaml:"kms"`

	// KMSKeys are the kinds of keys that are made in the KMS: root, intermediate,
	// jwt, policy. Default: all in a PKCS #11 token, the root alone in a cloud.
	KMSKeys []string `yaml:"kms_keys"`

	// Upstream is who signs this CA's intermediates: merlon, another CA of Merlon
	// and of the same trust domain, below which this one is nested; disk, a CA
	// whose certificate and key are in files; stepcas, vaultcas or cloudcas,
	// services of others. Default: none, the CA's own root does.
	Upstream string `yaml:"upstream"`

	// UpstreamRootFile holds, in PEM, the root of the upstream authority, with
	// which SVIDs are verified. Required with upstream, but not with merlon, where
	// root_hash names the first.
	UpstreamRootFile string `yaml:"upstream_root_file"`

	// UpstreamAddress is the gRPC address of the CA of Merlon that holds the root
	// key, host:port; the URL of step-ca or Vault, or the resource name of a CA in
	// Google's CAS.
	UpstreamAddress string `yaml:"upstream_address"`

	// UpstreamCertFile is the certificate of the CA on disk, followed by what is
	// above it; for stepcas that of an X5C provisioner.
	UpstreamCertFile string `yaml:"upstream_cert_file"`

	// UpstreamKeyFile is the key of the CA on disk, or of step-ca's provisioner.
	UpstreamKeyFile string `yaml:"upstream_key_file"`

	// UpstreamProvisioner is the name of step-ca's provisioner.
	UpstreamProvisioner string `yaml:"upstream_provisioner"`

	// UpstreamPasswordFile opens step-ca's provisioner key, if that is encrypted.
	UpstreamPasswordFile string `yaml:"upstream_password_file"`

	// UpstreamConfigFile is the JSON with vaultcas' settings, or Google's
	// credentials for cloudcas.
	UpstreamConfigFile string `yaml:"upstream_config_file"`

	// Address is where agents and administrators connect by gRPC, host:port.
	// Default: :8443.
	Address string `yaml:"address"`

	// HTTPSAddress serves policy bundles and the trust bundle. Default: :8444.
	HTTPSAddress string `yaml:"https_address"`

	// HealthAddress serves /live, /ready and /metrics without authentication:
	// keep it on loopback. Default: 127.0.0.1:9443.
	HealthAddress string `yaml:"health_address"`

	// AdminSocket is the Unix socket for administrators on this machine. Its
	// directory gets mode 0700, with admin_uids or admins 0711. Default:
	// /run/merlon/ca/admin.sock.
	AdminSocket string `yaml:"admin_socket"`

	// AdminUIDs are operators on the admin socket, beside root and the CA's own
	// user.
	AdminUIDs []uint32 `yaml:"admin_uids"`

	// Admins are further users of the admin socket, in roles. They have no flag.
	Admins []Admin `yaml:"admins"`

	// OIDC are the providers whose tokens administer the CA, in roles. They have
	// no flag.
	OIDC []OIDC `yaml:"oidc"`

	// FourEyes lets what touches the CA's keys, or makes an operator, wait for a second
	// administrator. Where one of several replicas has it, all do so. Default: false,
	// since a CA begins with one.
	FourEyes bool `yaml:"four_eyes"`

	// NodeAttestors are the kinds of evidence that prove a node, beside join
	// tokens. They have no flag.
	NodeAttestors NodeAttestors `yaml:"node_attestors"`

	// DNSNames are put into the CA's own certificate for clients that check
	// host names, such as a stock OPA. "localhost" is always there.
	DNSNames []string `yaml:"dns_names"`

	// BundleEndpoint serves the trust bundle to other trust domains, with a
	// certificate of the web. Default: none.
	BundleEndpoint BundleEndpoint `yaml:"bundle_endpoint"`

	// JWTIssuer is what JWT-SVIDs say in iss, https://HOST of the bundle endpoint:
	// there OpenID Connect discovery is served, for parties that take JWT-SVIDs as
	// ID tokens. The same on all replicas; who has it once keeps it. Default: none.
	JWTIssuer string `yaml:"jwt_issuer"`

	// X509SVIDTTL is how long a workload's X509-SVID lives if its entry does
	// not say. Agents renew at half of it. Default: 1h; at most 24h.
	X509SVIDTTL time.Duration `yaml:"x509_svid_ttl"`

	// JWTSVIDTTL is how long a JWT-SVID lives if the entry does not say.
	// Default: 5m; at most 1h.
	JWTSVIDTTL time.Duration `yaml:"jwt_svid_ttl"`

	// JWTAlgorithm is what JWT keys sign with that are made from now on: ES256, or
	// RS256 for relying parties that read nothing else, such as some clouds. A
	// key that is there stays as it is. Default: ES256.
	JWTAlgorithm string `yaml:"jwt_algorithm"`

	// JWTMaxAudiences is how many audiences one JWT-SVID may have. With more
	// than one, each of them can use the token at the others. Default: 1; at
	// most 8.
	JWTMaxAudiences int `yaml:"jwt_max_audiences"`

	// AgentIssueRate is how many SVIDs a second one agent gets from this CA, and one
	// more for each 20 of its entries; a minute's worth of that at once. Default: 100.
	AgentIssueRate int `yaml:"agent_issue_rate"`

	// AgentSVIDTTL is how long an agent's own X509-SVID lives. Default: 1h; at
	// most 24h.
	AgentSVIDTTL time.Duration `yaml:"agent_svid_ttl"`

	// AgentRecovery is how long after its own X509-SVID was issued an agent that
	// cannot reach the CA comes back by itself, without a new join token, also
	// when the SVID has ended by then. Not more than AgentSVIDTTL: not after its
	// end. Default: 24h, which is also the most: so long it is known what was
	// revoked.
	AgentRecovery time.Duration `yaml:"agent_recovery"`

	// RootTTL is how long a root lives, IntermediateTTL an intermediate, and
	// JWTKeyTTL a key that signs JWT-SVIDs. Each is replaced by itself at half of
	// it, so roots and JWT keys live ten TrustRefreshHints at least. Defaults:
	// 8760h, 24h, 720h.
	RootTTL         time.Duration `yaml:"root_ttl"`
	IntermediateTTL time.Duration `yaml:"intermediate_ttl"`
	JWTKeyTTL       time.Duration `yaml:"jwt_key_ttl"`

	// TrustRefreshHint is how often those who poll the trust bundle are told to.
	// A new key signs three of them after it was published. The same on all
	// replicas. Default: 5m; at most 1h.
	TrustRefreshHint time.Duration `yaml:"trust_refresh_hint"`

	// CanaryDeniedPerMille and CanaryMinCalls say when a policy candidate that decides
	// as a canary is taken back to shadow: when of at least so many calls that the
	// policy in force allows, to one destination or to all, it denied more than so many
	// in a thousand. The same on all replicas. Defaults: 10 and 100.
	CanaryDeniedPerMille int `yaml:"canary_denied_per_mille"`
	CanaryMinCalls       int `yaml:"canary_min_calls"`

	// Development marks the root as one that nobody should trust.
	Development bool `yaml:"development"`

	// LogLevel is debug, info, warn or error. Default: info.
	LogLevel string `yaml:"log_level"`

	// LogFormat is text or json. Default: text.
	LogFormat string `yaml:"log_format"`

	// AcceptOlderStore is the revision of a store that is known to have lost its
	// latest writes, such as one from a backup: the CA opens it as it is and
	// goes on in the next epoch. 0: such a store is refused.
	AcceptOlderStore uint64 `yaml:"-"`

	// NewStore lets the CA begin with a new store where the one that it had is lost
	// for good. Otherwise such a CA does not start.
	NewStore bool `yaml:"-"`

	// NewRoot lets the CA begin with a new root where the old one has ended, and
	// with it everything. Otherwise such a CA does not start.
	NewRoot bool `yaml:"-"`

	// Logger takes the log; nil discards it. merlon-ca makes it by LogLevel and
	// LogFormat, as NewLogger does.
	Logger *slog.Logger `yaml:"-"`

	// AdminServices register further services on the admin socket. All of their
	// RPCs are for administrators.
	AdminServices []func(grpc.ServiceRegistrar) `yaml:"-"`
}

// Validate says what is wrong with c, naming the key.
func (c Config) Validate() error {
	c = c.WithDefaults()
	if c.TrustDomain == "" {
		return errors.New("trust_domain: is missing")
	}
	td, err := entry.ParseTrustDomain("trust_domain", c.TrustDomain)
	if err != nil {
		return err
	}
	for key, address := range map[string]string{"address": c.Address, "https_address": c.HTTPSAddress, "health_address": c.HealthAddress} {
		if err := checkAddress(address); err != nil {
			return fmt.Errorf("%s: %q: %w", key, address, err)
		}
	}
	if len(c.AdminSocket) > unixsock.MaxPath {
		return fmt.Errorf("admin_socket: %q has %d bytes; a socket path has at most %d", c.AdminSocket, len(c.AdminSocket), unixsock.MaxPath)
	}
	if !filepath.IsAbs(c.AdminSocket) {
		return fmt.Errorf("admin_socket: %q is not an absolute path", c.AdminSocket)
	}
	for _, name := range c.DNSNames {
		if err := entry.CheckDNSName(name); err != nil {
			return err
		}
	}
	if err := c.checkStore(); err != nil {
		return err
	}
	if err := c.checkAudit(); err != nil {
		return err
	}
	if err := c.checkDecisionLog(); err != nil {
		return err
	}
	if err := c.checkJoin(); err != nil {
		return err
	}
	if err := cmp.Or(c.checkAdmins(), c.checkEndpoint()); err != nil {
		return err
	}
	if err := c.NodeAttestors.validate(td); err != nil {
		return err
	}
	if err := c.checkKeys(); err != nil {
		return err
	}
	if err := c.checkUpstream(); err != nil {
		return err
	}
	if _, err := c.NewLogger(io.Discard); err != nil {
		return err
	}
	return cmp.Or(c.checkTTLs(), c.checkCanary(), c.checkRotation())
}

// NewLogger is the log that LogLevel and LogFormat ask for, on w.
func (c Config) NewLogger(w io.Writer) (*slog.Logger, error) {
	c = c.WithDefaults()
	return settings.NewLogger(w, c.LogLevel, c.LogFormat)
}

func (c Config) checkTTLs() error {
	if n := c.AgentIssueRate; n < minAgentIssueRate || n > maxAgentIssueRate {
		return fmt.Errorf("agent_issue_rate: %d is not between %d and %d SVIDs a second", n, minAgentIssueRate, maxAgentIssueRate)
	}
	if n := c.JWTMaxAudiences; n < 1 || n > authority.MaxJWTAudiences {
		return fmt.Errorf("jwt_max_audiences: %d is not between 1 and %d", n, authority.MaxJWTAudiences)
	}
	for _, ttl := range []struct {
		key            string
		value, longest time.Duration
	}{
		{"x509_svid_ttl", c.X509SVIDTTL, entry.MaxX509SVIDTTL},
		{"jwt_svid_ttl", c.JWTSVIDTTL, entry.MaxJWTSVIDTTL},
		{"agent_svid_ttl", c.AgentSVIDTTL, entry.MaxSVIDTTL},
		{"agent_recovery", c.AgentRecovery, entry.MaxSVIDTTL},
	} {
		if ttl.value < entry.MinTTL || ttl.value > ttl.longest {
			return fmt.Errorf("%s: %s is not between %s and %s", ttl.key, ttl.value, entry.MinTTL, ttl.longest)
		}
	}
	return nil
}

func checkAddress(address string) error {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("want host:port")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errors.New("the port is not a number between 0 and 65535")
	}
	return nil
}

// WithDefaults is c with the default of each setting that it leaves out.
func (c Config) WithDefaults() Config {
	for _, s := range []struct {
		field *string
		def   string
	}{
		{&c.DataDir, DefaultDataDir},
		{&c.Store, Badger},
		{&c.IssuanceLog, DefaultIssuanceLog},
		{&c.Address, DefaultAddress},
		{&c.HTTPSAddress, DefaultHTTPSAddress},
		{&c.HealthAddress, DefaultHealthAddress},
		{&c.AdminSocket, DefaultAdminSocket},
		{&c.JWTAlgorithm, upstream.ES256},
		{&c.LogLevel, "info"},
		{&c.LogFormat, "text"},
	} {
		if *s.field == "" {
			*s.field = s.def
		}
	}
	for _, d := range []struct {
		field *time.Duration
		def   time.Duration
	}{
		{&c.X509SVIDTTL, DefaultX509SVIDTTL},
		{&c.JWTSVIDTTL, DefaultJWTSVIDTTL},
		{&c.AgentSVIDTTL, DefaultAgentSVIDTTL},
		{&c.AgentRecovery, entry.MaxSVIDTTL},
		{&c.AuditMaxAge, DefaultAuditMaxAge},
		{&c.RootTTL, upstream.DefaultRootTTL},
		{&c.IntermediateTTL, upstream.DefaultIntermediateTTL},
		{&c.JWTKeyTTL, DefaultJWTKeyTTL},
		{&c.TrustRefreshHint, trust.RefreshHint},
	} {
		if *d.field == 0 {
			*d.field = d.def
		}
	}
	if c.DiskReserveMiB == 0 {
		c.DiskReserveMiB = DefaultDiskReserveMiB
	}
	if c.AuditMaxMiB == 0 {
		c.AuditMaxMiB = DefaultAuditMaxMiB
	}
	if c.DecisionLogMaxMiB == 0 {
		c.DecisionLogMaxMiB = DefaultDecisionLogMaxMiB
	}
	if c.DecisionLogKeep == 0 {
		c.DecisionLogKeep = DefaultDecisionLogKeep
	}
	if c.AgentIssueRate == 0 {
		c.AgentIssueRate = DefaultAgentIssueRate
	}
	c.canaryDefaults()
	if c.JWTMaxAudiences == 0 {
		c.JWTMaxAudiences = DefaultJWTMaxAudiences
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

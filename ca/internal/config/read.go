// How settings are read: from the file, and one by one from the command line and the
// environment.

package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"merlon.dev/policy/strictyaml"
)

// ReadFile reads a YAML file. Unknown keys are errors.
func ReadFile(path string) (Config, error) {
	data, err := strictyaml.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read the configuration: %w", err)
	}
	return Parse(path, data)
}

// Parse reads YAML; name is for errors, which name the line.
func Parse(name string, data []byte) (Config, error) {
	var c Config
	if err := strictyaml.Decode(name, data, &c); err != nil {
		return Config{}, fmt.Errorf("read the configuration: %w", err)
	}
	return c, nil
}

// Keys are the names of the settings that Set takes: those of the file.
func Keys() []string {
	return []string{
		"trust_domain", "data_dir", "store", "disk_reserve_mib", "issuance_log", "audit_max_age", "audit_max_mib",
		"decision_log_file", "decision_log_max_mib", "decision_log_keep",
		"etcd_endpoints", "etcd_ca_file", "etcd_cert_file", "etcd_key_file", "etcd_prefix",
		"replica_name", "join_address", "join_token", "join_token_file", "root_hash",
		"key_file", "key_credential", "key_passphrase_file", "kms", "kms_keys",
		"upstream", "upstream_root_file", "upstream_address", "upstream_cert_file", "upstream_key_file",
		"upstream_provisioner", "upstream_password_file", "upstream_config_file",
		"address", "https_address", "health_address", "admin_socket", "admin_uids", "dns_names",
		"x509_svid_ttl", "jwt_svid_ttl", "jwt_issuer", "jwt_algorithm", "jwt_max_audiences", "agent_issue_rate", "agent_svid_ttl", "agent_recovery",
		"root_ttl", "intermediate_ttl", "jwt_key_ttl", "trust_refresh_hint",
		"canary_denied_per_mille", "canary_min_calls", "development",
		"log_level", "log_format",
	}
}

// Set overrides one setting with text from a flag or the environment. Lists
// are separated by commas.
func (c *Config) Set(key, text string) error {
	if field := c.text(key); field != nil {
		*field = text
		return nil
	}
	if field := c.duration(key); field != nil {
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%s: %q: %w", key, text, err)
		}
		*field = d
		return nil
	}
	var err error
	switch key {
	case "disk_reserve_mib":
		c.DiskReserveMiB, err = strconv.Atoi(text)
	case "audit_max_age":
		c.AuditMaxAge, err = time.ParseDuration(text)
	case "audit_max_mib":
		c.AuditMaxMiB, err = strconv.Atoi(text)
	case "decision_log_max_mib":
		c.DecisionLogMaxMiB, err = strconv.Atoi(text)
	case "decision_log_keep":
		c.DecisionLogKeep, err = strconv.Atoi(text)
	case "jwt_max_audiences":
		c.JWTMaxAudiences, err = strconv.Atoi(text)
	case "agent_issue_rate":
		c.AgentIssueRate, err = strconv.Atoi(text)
	case "canary_denied_per_mille":
		c.CanaryDeniedPerMille, err = strconv.Atoi(text)
	case "canary_min_calls":
		c.CanaryMinCalls, err = strconv.Atoi(text)
	case "etcd_endpoints":
		c.EtcdEndpoints = splitList(text)
	case "admin_uids":
		c.AdminUIDs, err = parseUIDs(text)
	case "kms_keys":
		c.KMSKeys = splitList(text)
	case "dns_names":
		c.DNSNames = splitList(text)
	case "development":
		c.Development, err = strconv.ParseBool(text)
	default:
		err = errors.New("no such setting")
	}
	if err != nil {
		return fmt.Errorf("%s: %q: %w", key, text, err)
	}
	return nil
}

// text is the setting called key, where that is plain text; otherwise nil.
func (c *Config) text(key string) *string {
	return map[string]*string{
		"trust_domain": &c.TrustDomain, "data_dir": &c.DataDir, "store": &c.Store, "issuance_log": &c.IssuanceLog,
		"decision_log_file": &c.DecisionLogFile,
		"etcd_ca_file":      &c.EtcdCAFile, "etcd_cert_file": &c.EtcdCertFile, "etcd_key_file": &c.EtcdKeyFile, "etcd_prefix": &c.EtcdPrefix,
		"replica_name": &c.ReplicaName, "join_address": &c.JoinAddress, "join_token": &c.JoinToken,
		"join_token_file": &c.JoinTokenFile, "root_hash": &c.RootHash,
		"key_file": &c.KeyFile, "key_credential": &c.KeyCredential, "key_passphrase_file": &c.KeyPassphraseFile, "kms": &c.KMS,
		"upstream": &c.Upstream, "upstream_root_file": &c.UpstreamRootFile, "upstream_address": &c.UpstreamAddress,
		"upstream_cert_file": &c.UpstreamCertFile, "upstream_key_file": &c.UpstreamKeyFile, "upstream_provisioner": &c.UpstreamProvisioner,
		"upstream_password_file": &c.UpstreamPasswordFile, "upstream_config_file": &c.UpstreamConfigFile,
		"address": &c.Address, "https_address": &c.HTTPSAddress, "health_address": &c.HealthAddress,
		"admin_socket": &c.AdminSocket, "jwt_algorithm": &c.JWTAlgorithm, "jwt_issuer": &c.JWTIssuer, "log_level": &c.LogLevel, "log_format": &c.LogFormat,
	}[key]
}

// duration is the setting called key, where that is one; otherwise nil.
func (c *Config) duration(key string) *time.Duration {
	return map[string]*time.Duration{
		"x509_svid_ttl": &c.X509SVIDTTL, "jwt_svid_ttl": &c.JWTSVIDTTL, "agent_svid_ttl": &c.AgentSVIDTTL, "agent_recovery": &c.AgentRecovery,
		"root_ttl": &c.RootTTL, "intermediate_ttl": &c.IntermediateTTL, "jwt_key_ttl": &c.JWTKeyTTL,
		"trust_refresh_hint": &c.TrustRefreshHint,
	}[key]
}

func splitList(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(text, ",")
}

func parseUIDs(text string) ([]uint32, error) {
	var uids []uint32
	for _, s := range splitList(text) {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, err
		}
		uids = append(uids, uint32(n))
	}
	return uids, nil
}

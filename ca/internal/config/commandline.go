// The command line and environment of merlon-ca: flags over environment over
// file over defaults.

package config

import (
	"flag"
	"io"

	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/sdk/settings"
)

// CommandLine is what merlon-ca was asked to do.
type CommandLine struct {
	Config Config
	// ValidateOnly: look at the settings and leave.
	ValidateOnly bool
}

const about = `merlon-ca is the certificate authority of a trust domain.

Example:
  merlon-ca -config /etc/merlon/ca.yaml
`

var program = settings.Program[Config]{
	Name: "merlon-ca", Env: "MERLON_CA_", About: about,
	Settings: []settings.Setting[Config]{
		{Key: "trust_domain", Usage: "name under which every SPIFFE ID is issued, such as example.org (required)"},
		{Key: "data_dir", Usage: "folder of the store, the keys and the audit log (default " + DefaultDataDir + ")"},
		{Key: "store", Usage: "badger, in data_dir, or etcd (default badger)"},
		{Key: "disk_reserve_mib", Usage: "MiB of disk that stay free; with less, nothing is written (default 256)"},
		{Key: "issuance_log", Usage: "strict: an SVID leaves once its record is on disk; async: at once (default strict)"},
		{Key: "audit_max_age", Usage: "how long audit records are kept (default 168h)"},
		{Key: "audit_max_mib", Usage: "how many MiB of audit records are kept (default 10240)"},
		{Key: "decision_log_file", Usage: "file for the decision logs that agents and OPAs upload (default: they are dropped)"},
		{Key: "decision_log_max_mib", Usage: "how many MiB it becomes before another is begun (default 64)"},
		{Key: "decision_log_keep", Usage: "how many older ones are kept (default 4)"},
		{Key: "etcd_endpoints", Usage: "client URLs of etcd's members, separated by commas (store etcd)"},
		{Key: "etcd_ca_file", Usage: "PEM file with the CA of etcd's members"},
		{Key: "etcd_cert_file", Usage: "PEM file with our certificate for etcd"},
		{Key: "etcd_key_file", Usage: "PEM file with the key of etcd_cert_file"},
		{Key: "etcd_prefix", Usage: "beginning of all keys in etcd (default " + etcd.DefaultPrefix + ")"},
		{Key: "replica_name", Usage: "name among the CA's replicas (default: " + DefaultReplicaName + " with the root, otherwise that in the join token)"},
		{Key: "join_address", Usage: "host:port of the replica that holds the root key, to become a replica of it (store etcd)"},
		{Key: "join_token", Secret: true},
		{Key: "join_token_file", Usage: "file with the replica's join token"},
		{Key: "root_hash", Usage: "SHA-256 of the root's public key in hex, as printed with the token"},
		{Key: "key_file", Usage: "file with the key under which private keys are sealed, 64 hex digits (default: kek in data_dir, made when missing)"},
		{Key: "key_credential", Usage: "name of the systemd credential with that key, instead of a file"},
		{Key: "key_passphrase_file", Usage: "file with a passphrase, of which that key is made"},
		{Key: "kms", Usage: "URI of a KMS that makes and holds private keys, such as pkcs11:token=merlon?pin-source=/etc/merlon/pin"},
		{Key: "kms_keys", Usage: "kinds of keys, separated by commas, made in the KMS: root, intermediate, jwt, policy (default: all in a token, root in a cloud)"},
		{Key: "upstream", Usage: "who signs this CA's intermediates: disk, stepcas, vaultcas or cloudcas (default: its own root)"},
		{Key: "upstream_root_file", Usage: "PEM file with the upstream authority's root"},
		{Key: "upstream_address", Usage: "URL of step-ca or Vault, resource name of a Google CA"},
		{Key: "upstream_cert_file", Usage: "PEM file with the certificate of the CA on disk and what is above it, or of step-ca's X5C provisioner"},
		{Key: "upstream_key_file", Usage: "PEM file with the key of the CA on disk, or of step-ca's provisioner"},
		{Key: "upstream_provisioner", Usage: "name of step-ca's provisioner"},
		{Key: "upstream_password_file", Usage: "file with the password of upstream_key_file (stepcas)"},
		{Key: "upstream_config_file", Usage: "JSON file with the settings of vaultcas, or Google's credentials"},
		{Key: "address", Usage: "host:port of gRPC (default " + DefaultAddress + ")"},
		{Key: "https_address", Usage: "host:port of HTTPS (default " + DefaultHTTPSAddress + ")"},
		{Key: "health_address", Usage: "host:port of health and metrics (default " + DefaultHealthAddress + ")"},
		{Key: "admin_socket", Usage: "path of the admin socket (default " + DefaultAdminSocket + ")"},
		{Key: "admin_uids", Usage: "uids, separated by commas, that may use the admin socket beside root and the CA's own"},
		{Key: "four_eyes", Usage: "let what touches the CA's keys wait for a second administrator", Switch: true},
		{Key: "dns_names", Usage: "DNS names, separated by commas, in the CA's own certificate beside localhost"},
		{Key: "x509_svid_ttl", Usage: "life of X509-SVIDs whose entry does not say (default 1h)"},
		{Key: "jwt_svid_ttl", Usage: "life of JWT-SVIDs whose entry does not say (default 5m)"},
		{Key: "jwt_issuer", Usage: "what JWT-SVIDs say in iss, https://HOST of bundle_endpoint"},
		{Key: "jwt_algorithm", Usage: "ES256 or RS256: what JWT keys made from now on sign with (default ES256)"},
		{Key: "jwt_max_audiences", Usage: "how many audiences one JWT-SVID may have (default 1)"},
		{Key: "agent_issue_rate", Usage: "how many SVIDs a second an agent gets, beside one for each 20 of its entries (default 100)"},
		{Key: "agent_svid_ttl", Usage: "life of the agents' X509-SVIDs (default 1h)"},
		{Key: "agent_recovery", Usage: "how long after it was issued an agent comes back by its X509-SVID, also after its end (default 24h, the most)"},
		{Key: "root_ttl", Usage: "life of a root (default 8760h)"},
		{Key: "intermediate_ttl", Usage: "life of an intermediate (default 24h)"},
		{Key: "jwt_key_ttl", Usage: "life of a key that signs JWT-SVIDs (default 720h)"},
		{Key: "trust_refresh_hint", Usage: "how often those who poll the trust bundle should; a new key signs after three (default 5m)"},
		{Key: "canary_denied_per_mille", Usage: "of a thousand calls that the policy in force allows, how many a canary may deny before it is paused (default 10)"},
		{Key: "canary_min_calls", Usage: "of how many such calls at least that is judged (default 100)"},
		{Key: "development", Usage: "mark the root as a development root", Switch: true},
		{Key: "log_level", Usage: "debug, info, warn or error (default info)"},
		{Key: "log_format", Usage: "text or json (default text)"},
	},
}

// ParseCommandLine reads args (without the program's name), the environment
// and the file that they name, and validates the outcome. flag.ErrHelp means
// that help was asked for and printed to out.
func ParseCommandLine(args []string, getenv func(string) string, out io.Writer) (*CommandLine, error) {
	var older uint64
	var newStore, newRoot bool
	p := program
	p.Flags = func(set *flag.FlagSet) {
		set.Uint64Var(&older, "accept-older-store", 0, "`revision` of a store that is known to have lost its latest writes, such as one from a backup: open it all the same")
		set.BoolVar(&newStore, "new-store", false, "begin with a new store where the one before is lost for good, with every entry, agent and revocation in it")
		set.BoolVar(&newRoot, "new-root", false, "begin with a new root where the old one has ended: every agent needs a new join token")
	}
	var cl CommandLine
	line, err := p.Read(&cl.Config, args, getenv, out)
	if err != nil {
		return nil, err
	}
	if err := p.Unexpected(line); err != nil {
		return nil, err
	}
	cl.ValidateOnly = line.ValidateOnly
	cl.Config.AcceptOlderStore, cl.Config.NewStore, cl.Config.NewRoot = older, newStore, newRoot
	return &cl, cl.Config.Validate()
}

// ForStore reads the settings that say where a store is: from the file
// of merlon-ca and its environment, or, where file is empty, the Badger store
// in dataDir.
func ForStore(file, dataDir string, getenv func(string) string) (Config, error) {
	if file == "" {
		return Config{DataDir: dataDir}.WithDefaults(), nil
	}
	cl, err := ParseCommandLine([]string{"-config", file}, getenv, io.Discard)
	if err != nil {
		return Config{}, err
	}
	return cl.Config.WithDefaults(), nil
}

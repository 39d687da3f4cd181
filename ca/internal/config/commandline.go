// The command line and environment of merlon-ca: flags over environment over
// file over defaults.

package config

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"

	"merlon.dev/ca/internal/store/etcd"
)

// EnvPrefix begins the environment variable of each setting, as in
// MERLON_CA_TRUST_DOMAIN.
const EnvPrefix = "MERLON_CA_"

// CommandLine is what merlon-ca was asked to do.
type CommandLine struct {
	Config Config
	// ValidateOnly: look at the settings and leave.
	ValidateOnly bool
}

var usage = map[string]string{ //nolint:gosec // says what settings are; holds no secret
	"trust_domain":           "name under which every SPIFFE ID is issued, such as example.org (required)",
	"data_dir":               "folder of the store, the keys and the audit log (default " + DefaultDataDir + ")",
	"store":                  "badger, in data_dir, or etcd (default badger)",
	"issuance_log":           "strict: an SVID leaves once its record is on disk; async: at once (default strict)",
	"audit_max_age":          "how long audit records are kept (default 168h)",
	"audit_max_mib":          "how many MiB of audit records are kept (default 10240)",
	"decision_log_file":      "file for the decision logs that agents and OPAs upload (default: they are dropped)",
	"decision_log_max_mib":   "how many MiB it becomes before another is begun (default 64)",
	"decision_log_keep":      "how many older ones are kept (default 4)",
	"disk_reserve_mib":       "MiB of disk that stay free; with less, nothing is written (default 256)",
	"etcd_endpoints":         "client URLs of etcd's members, separated by commas (store etcd)",
	"etcd_ca_file":           "PEM file with the CA of etcd's members",
	"etcd_cert_file":         "PEM file with our certificate for etcd",
	"etcd_key_file":          "PEM file with the key of etcd_cert_file",
	"etcd_prefix":            "beginning of all keys in etcd (default " + etcd.DefaultPrefix + ")",
	"replica_name":           "name among the CA's replicas (default: " + DefaultReplicaName + " with the root, otherwise that in the join token)",
	"join_address":           "host:port of the replica that holds the root key, to become a replica of it (store etcd)",
	"join_token_file":        "file with the replica's join token",
	"root_hash":              "SHA-256 of the root's public key in hex, as printed with the token",
	"key_file":               "file with the key under which private keys are sealed, 64 hex digits (default: kek in data_dir, made when missing)",
	"key_credential":         "name of the systemd credential with that key, instead of a file",
	"key_passphrase_file":    "file with a passphrase, of which that key is made",
	"kms":                    "URI of a KMS that makes and holds private keys, such as pkcs11:token=merlon?pin-source=/etc/merlon/pin",
	"kms_keys":               "kinds of keys, separated by commas, made in the KMS: root, intermediate, jwt, policy (default: all in a token, root in a cloud)",
	"upstream":               "who signs this CA's intermediates: disk, stepcas, vaultcas or cloudcas (default: its own root)",
	"upstream_root_file":     "PEM file with the upstream authority's root",
	"upstream_address":       "URL of step-ca or Vault, resource name of a Google CA",
	"upstream_cert_file":     "PEM file with the certificate of the CA on disk and what is above it, or of step-ca's X5C provisioner",
	"upstream_key_file":      "PEM file with the key of the CA on disk, or of step-ca's provisioner",
	"upstream_provisioner":   "name of step-ca's provisioner",
	"upstream_password_file": "file with the password of upstream_key_file (stepcas)",
	"upstream_config_file":   "JSON file with the settings of vaultcas, or Google's credentials",
	"address":                "host:port of gRPC (default " + DefaultAddress + ")",
	"https_address":          "host:port of HTTPS (default " + DefaultHTTPSAddress + ")",
	"health_address":         "host:port of health and metrics (default " + DefaultHealthAddress + ")",
	"admin_socket":           "path of the admin socket (default " + DefaultAdminSocket + ")",
	"admin_uids":             "uids, separated by commas, that may use the admin socket beside root and the CA's own",
	"dns_names":              "DNS names, separated by commas, in the CA's own certificate beside localhost",
	"x509_svid_ttl":          "life of X509-SVIDs whose entry does not say (default 1h)",
	"jwt_svid_ttl":           "life of JWT-SVIDs whose entry does not say (default 5m)",
	"jwt_issuer":             "what JWT-SVIDs say in iss, https://HOST of bundle_endpoint",
	"jwt_algorithm":          "ES256 or RS256: what JWT keys made from now on sign with (default ES256)",
	"agent_issue_rate":       "how many SVIDs a second an agent gets, beside one for each 20 of its entries (default 100)",
	"jwt_max_audiences":      "how many audiences one JWT-SVID may have (default 1)",
	"agent_svid_ttl":         "life of the agents' X509-SVIDs (default 1h)",
	"agent_recovery":         "how long after it was issued an agent comes back by its X509-SVID, also after its end (default 24h, the most)",
	"root_ttl":               "life of a root (default 8760h)",
	"intermediate_ttl":       "life of an intermediate (default 24h)",
	"jwt_key_ttl":            "life of a key that signs JWT-SVIDs (default 720h)",
	"trust_refresh_hint":     "how often those who poll the trust bundle should; a new key signs after three (default 5m)",

	"canary_denied_per_mille": "of a thousand calls that the policy in force allows, how many a canary may deny before it is paused (default 10)",
	"canary_min_calls":        "of how many such calls at least that is judged (default 100)",

	"development": "mark the root as a development root",
	"log_level":   "debug, info, warn or error (default info)",
	"log_format":  "text or json (default text)",
}

// ParseCommandLine reads args (without the program's name), the environment
// and the file that they name, and validates the outcome. flag.ErrHelp means
// that help was asked for and printed to out.
func ParseCommandLine(args []string, getenv func(string) string, out io.Writer) (*CommandLine, error) {
	var cl CommandLine
	set := flag.NewFlagSet("merlon-ca", flag.ContinueOnError)
	set.SetOutput(io.Discard) // the caller reports mistakes, once
	help := func() {
		set.SetOutput(out)
		fmt.Fprintf(out, "merlon-ca is the certificate authority of a trust domain.\n\nExample:\n  merlon-ca -config /etc/merlon/ca.yaml\n\nEach setting can also come from %sNAME in the environment.\n\nFlags:\n", EnvPrefix)
		set.PrintDefaults()
	}
	file := set.String("config", "", "YAML file with the settings")
	set.BoolVar(&cl.ValidateOnly, "validate", false, "look at the settings and leave")
	older := set.Uint64("accept-older-store", 0, "`revision` of a store that is known to have lost its latest writes, such as one from a backup: open it all the same")
	newStore := set.Bool("new-store", false, "begin with a new store where the one before is lost for good, with every entry, agent and revocation in it")
	newRoot := set.Bool("new-root", false, "begin with a new root where the old one has ended: every agent needs a new join token")
	given := make(map[string]string)
	for _, key := range Keys() {
		if key == "join_token" {
			continue // a command line is not secret
		}
		take := func(text string) error { given[key] = text; return nil }
		if name := strings.ReplaceAll(key, "_", "-"); key == "development" {
			set.BoolFunc(name, usage[key], take)
		} else {
			set.Func(name, usage[key], take)
		}
	}
	if err := set.Parse(args); errors.Is(err, flag.ErrHelp) {
		help()
		return nil, err
	} else if err != nil {
		return nil, &UsageError{err.Error()}
	}
	if set.NArg() > 0 {
		return nil, &UsageError{fmt.Sprintf("unexpected argument %q", set.Arg(0))}
	}
	if *file == "" {
		*file = getenv(EnvPrefix + "CONFIG")
	}
	if err := cl.load(*file, getenv, given); err != nil {
		return nil, err
	}
	cl.Config.AcceptOlderStore, cl.Config.NewStore, cl.Config.NewRoot = *older, *newStore, *newRoot
	return &cl, cl.Config.Validate()
}

func (cl *CommandLine) load(file string, getenv func(string) string, given map[string]string) error {
	if file != "" {
		var err error
		if cl.Config, err = ReadFile(file); err != nil {
			return err
		}
	}
	for _, key := range Keys() {
		text, ok := given[key]
		if !ok {
			text = getenv(EnvPrefix + strings.ToUpper(key))
			ok = text != ""
		}
		if !ok {
			continue
		}
		if err := cl.Config.Set(key, text); err != nil {
			return err
		}
	}
	return nil
}

// UsageError is a mistake in the command line itself.
type UsageError struct{ Reason string }

// Error implements error.
func (e *UsageError) Error() string { return e.Reason }

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

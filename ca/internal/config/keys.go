// The settings of the CA's keys: under what they are sealed.

package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/seal"
)

func (c Config) checkKeys() error {
	if a := c.JWTAlgorithm; a != upstream.ES256 && a != upstream.RS256 {
		return fmt.Errorf("jwt_algorithm: %q is neither %s nor %s", a, upstream.ES256, upstream.RS256)
	}
	given := 0
	for _, source := range []string{c.KeyFile, c.KeyCredential, c.KeyPassphraseFile} {
		if source != "" {
			given++
		}
	}
	if given > 1 {
		return errors.New("key_file, key_credential and key_passphrase_file: at most one says under what the keys are sealed")
	}
	if strings.Contains(c.KeyCredential, "/") {
		return fmt.Errorf("key_credential: %q is not the name of a credential; for a path use key_file", c.KeyCredential)
	}
	if dir := c.KeysDir() + "/"; strings.HasPrefix(filepath.Clean(c.KeyFile), dir) || strings.HasPrefix(filepath.Clean(c.KeyPassphraseFile), dir) {
		return fmt.Errorf("key_file: is inside %s, beside what it seals: keep it elsewhere", dir)
	}
	return c.kms().Validate()
}

// UpstreamMerlon is the upstream of a nested CA, which follows it, and needs no CAS.
const UpstreamMerlon = "merlon"

func (c Config) authority() upstream.AuthorityConfig {
	if c.Nested() {
		return upstream.AuthorityConfig{}
	}
	return upstream.AuthorityConfig{
		Type: c.Upstream, RootFile: c.UpstreamRootFile, Address: c.UpstreamAddress,
		CertFile: c.UpstreamCertFile, KeyFile: c.UpstreamKeyFile,
		Provisioner: c.UpstreamProvisioner, PasswordFile: c.UpstreamPasswordFile, ConfigFile: c.UpstreamConfigFile,
	}
}

func (c Config) checkUpstream() error {
	if c.Nested() {
		return c.checkNested()
	}
	if c.Upstream != "" && c.Store != Badger {
		return fmt.Errorf("upstream: %s signs for a CA of one replica, so store must be badger", c.Upstream)
	}
	return c.authority().Validate()
}

// checkNested refuses settings that a nested CA would ignore.
func (c Config) checkNested() error {
	for _, other := range []struct{ key, value string }{
		{"upstream_root_file", c.UpstreamRootFile},
		{"upstream_cert_file", c.UpstreamCertFile},
		{"upstream_key_file", c.UpstreamKeyFile},
		{"upstream_provisioner", c.UpstreamProvisioner},
		{"upstream_password_file", c.UpstreamPasswordFile},
		{"upstream_config_file", c.UpstreamConfigFile},
	} {
		if other.value != "" {
			return fmt.Errorf("%s: is for other upstreams; with upstream merlon there is upstream_address, and to join root_hash and join_token_file", other.key)
		}
	}
	switch {
	case c.Store != Badger:
		return errors.New("upstream: a nested CA is one process with a store of its own, so store must be badger; more processes on one etcd are replicas (join_address)")
	case c.JoinAddress != "":
		return errors.New("join_address: is for replicas, which share a store; a nested CA has upstream_address")
	case c.UpstreamAddress == c.Address:
		return fmt.Errorf("upstream_address: %s is this CA's own address; give that of the CA that holds the root key", c.UpstreamAddress)
	}
	return nil
}

func (c Config) kms() upstream.KMSConfig { return upstream.KMSConfig{URI: c.KMS, Keys: c.KMSKeys} }

// KeysDir is where the keys lie.
func (c Config) KeysDir() string { return filepath.Join(c.DataDir, "keys") }

// KEK is where the key-encryption key is.
func (c Config) KEK() (seal.Source, error) {
	return seal.FromSettings(c.KeyFile, c.KeyCredential, c.KeyPassphraseFile)
}

// SealedUnder names that place for people.
func (c Config) SealedUnder() string {
	switch {
	case c.KeyFile != "":
		return "key_file " + c.KeyFile
	case c.KeyCredential != "":
		return "key_credential " + c.KeyCredential
	case c.KeyPassphraseFile != "":
		return "key_passphrase_file " + c.KeyPassphraseFile
	default:
		return "the file kek in data_dir"
	}
}

// Authorities are what the settings say about keys and authorities.
func (c Config) Authorities() (upstream.Config, error) {
	kek, err := c.KEK()
	if err != nil {
		return upstream.Config{}, err
	}
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return upstream.Config{}, fmt.Errorf("trust_domain: %w", err)
	}
	cfg := upstream.Config{
		TrustDomain: td, Dir: c.KeysDir(), Development: c.Development, Name: c.ReplicaName, KEK: kek, KMS: c.kms(), Upstream: c.authority(), Logger: c.Logger,
		JWTAlgorithm: c.JWTAlgorithm, RootTTL: c.RootTTL, IntermediateTTL: c.IntermediateTTL, NewRoot: c.NewRoot,
	}
	if c.Upstream != "" {
		cfg.RootTTL = 0 // of our own root, which is in no trust bundle then, and is not replaced
	}
	return cfg, nil
}

// The settings of the CA's keys: under what they are sealed.

package ca

import (
	"context"
	"errors"
	"fmt"
	"os"
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
	if dir := c.keysDir() + "/"; strings.HasPrefix(filepath.Clean(c.KeyFile), dir) || strings.HasPrefix(filepath.Clean(c.KeyPassphraseFile), dir) {
		return fmt.Errorf("key_file: is inside %s, beside what it seals: keep it elsewhere", dir)
	}
	return c.kms().Validate()
}

// upstreamMerlon is the upstream of a nested CA, which follows it, and needs no CAS.
const upstreamMerlon = "merlon"

func (c Config) authority() upstream.AuthorityConfig {
	if c.nested() {
		return upstream.AuthorityConfig{}
	}
	return upstream.AuthorityConfig{
		Type: c.Upstream, RootFile: c.UpstreamRootFile, Address: c.UpstreamAddress,
		CertFile: c.UpstreamCertFile, KeyFile: c.UpstreamKeyFile,
		Provisioner: c.UpstreamProvisioner, PasswordFile: c.UpstreamPasswordFile, ConfigFile: c.UpstreamConfigFile,
	}
}

func (c Config) checkUpstream() error {
	if c.nested() {
		return c.checkNested()
	}
	if c.Upstream != "" && c.Store != storeBadger {
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
	case c.Store != storeBadger:
		return errors.New("upstream: a nested CA is one process with a store of its own, so store must be badger; more processes on one etcd are replicas (join_address)")
	case c.JoinAddress != "":
		return errors.New("join_address: is for replicas, which share a store; a nested CA has upstream_address")
	case c.UpstreamAddress == c.Address:
		return fmt.Errorf("upstream_address: %s is this CA's own address; give that of the CA that holds the root key", c.UpstreamAddress)
	}
	return nil
}

func (c Config) kms() upstream.KMSConfig { return upstream.KMSConfig{URI: c.KMS, Keys: c.KMSKeys} }

func (c Config) keysDir() string { return filepath.Join(c.DataDir, "keys") }

// kek is where the key-encryption key is.
func (c Config) kek() (seal.Source, error) {
	return seal.FromSettings(c.KeyFile, c.KeyCredential, c.KeyPassphraseFile)
}

// sealedUnder names that place for people.
func (c Config) sealedUnder() string {
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

// upstream is what the settings say about keys and authorities.
func (c Config) upstream() (upstream.Config, error) {
	kek, err := c.kek()
	if err != nil {
		return upstream.Config{}, err
	}
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	if err != nil {
		return upstream.Config{}, fmt.Errorf("trust_domain: %w", err)
	}
	cfg := upstream.Config{
		TrustDomain: td, Dir: c.keysDir(), Development: c.Development, Name: c.ReplicaName, KEK: kek, KMS: c.kms(), Upstream: c.authority(), Logger: c.Logger,
		JWTAlgorithm: c.JWTAlgorithm, RootTTL: c.RootTTL, IntermediateTTL: c.IntermediateTTL, NewRoot: c.NewRoot,
	}
	if c.Upstream != "" {
		cfg.RootTTL = 0 // of our own root, which is in no trust bundle then, and is not replaced
	}
	return cfg, nil
}

// Resealed says what ResealKeys did.
type Resealed struct {
	Dir string
	// Sealed keys were sealed anew; Already are those that were under the new
	// key-encryption key.
	Sealed, Already int
}

// ResealKeys seals the keys of from, which no CA may use, under what to says.
func ResealKeys(ctx context.Context, from, to Config) (Resealed, error) {
	if from.keysDir() != to.keysDir() || from.TrustDomain != to.TrustDomain {
		return Resealed{}, &MismatchError{
			fmt.Sprintf("both configurations must be of one CA: they are of %s in %s, and of %s in %s", from.TrustDomain, from.DataDir, to.TrustDomain, to.DataDir),
			"copy the one in use, and change nothing in it but key_file, key_credential or key_passphrase_file",
		}
	}
	if from.KeyFile == to.KeyFile && from.KeyCredential == to.KeyCredential && from.KeyPassphraseFile == to.KeyPassphraseFile {
		return Resealed{}, &MismatchError{
			"both configurations seal the keys under the same: " + from.sealedUnder(),
			"name another one with key_file, key_credential or key_passphrase_file in the configuration for --to",
		}
	}
	cfg, err := from.upstream()
	if err != nil {
		return Resealed{}, err
	}
	source, err := to.kek()
	if err != nil {
		return Resealed{}, err
	}
	if _, err := os.Stat(cfg.Dir); err != nil {
		return Resealed{}, fmt.Errorf("reseal the keys: %w", err) // nor make it to lock it
	}
	lock, err := upstream.Lock(cfg.Dir)
	if err != nil {
		return Resealed{}, err
	}
	done, err := upstream.Reseal(ctx, cfg, source)
	return Resealed{Dir: cfg.Dir, Sealed: done.Sealed, Already: done.Already}, errors.Join(err, lock.Close())
}

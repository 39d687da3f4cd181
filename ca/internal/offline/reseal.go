// Sealing the keys of a CA that does not run anew.

package offline

import (
	"context"
	"errors"
	"fmt"
	"os"

	"merlon.dev/ca/internal/config"
	"merlon.dev/ca/internal/upstream"
)

// Resealed says what ResealKeys did.
type Resealed struct {
	Dir string
	// Sealed keys were sealed anew; Already are those that were under the new
	// key-encryption key.
	Sealed, Already int
}

// ResealKeys seals the keys of from, which no CA may use, under what to says.
func ResealKeys(ctx context.Context, from, to config.Config) (Resealed, error) {
	if from.KeysDir() != to.KeysDir() || from.TrustDomain != to.TrustDomain {
		return Resealed{}, &MismatchError{
			fmt.Sprintf("both configurations must be of one CA: they are of %s in %s, and of %s in %s", from.TrustDomain, from.DataDir, to.TrustDomain, to.DataDir),
			"copy the one in use, and change nothing in it but key_file, key_credential or key_passphrase_file",
		}
	}
	if from.KeyFile == to.KeyFile && from.KeyCredential == to.KeyCredential && from.KeyPassphraseFile == to.KeyPassphraseFile {
		return Resealed{}, &MismatchError{
			"both configurations seal the keys under the same: " + from.SealedUnder(),
			"name another one with key_file, key_credential or key_passphrase_file in the configuration for --to",
		}
	}
	cfg, err := from.Authorities()
	if err != nil {
		return Resealed{}, err
	}
	source, err := to.KEK()
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

// MismatchError says why two configurations are no pair that something can be moved
// between.
type MismatchError struct{ Reason, Hint string }

// Error implements error.
func (e *MismatchError) Error() string { return e.Reason }

// The key-encryption key, under which private keys lie in files: 32 bytes from a
// file or a systemd credential, or a passphrase. Where none is configured, one is
// made beside the folder of the keys: that protects copies of the folder alone,
// such as backups, and asks nothing of the operator.

package upstream

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/crypto/scrypt"

	"merlon.dev/sdk/durable"
)

// KEKFile is the name of the key-encryption key that is made where none is
// configured.
const KEKFile = "kek"

const (
	kekSize = 32
	// minPassphrase is short for a secret, and long enough to exclude mistakes.
	minPassphrase = 12
	maxSecret     = 1 << 10
	scryptR       = 8
	scryptP       = 1
)

// scryptLogN is for what is sealed from now on: 128 MiB and half a second.
var scryptLogN byte = 17

// ErrNoKEK is returned when what the keys are sealed under is not there.
var ErrNoKEK = errors.New("the key-encryption key is not there")

// KEKSource says where the key-encryption key is. At most one field is set; with
// none it is KEKFile beside the folder of the keys, made on first use.
type KEKSource struct {
	// File holds 64 hex digits and is readable by its owner alone.
	File string
	// Credential is a file of systemd's, which guards it itself; as File.
	Credential string
	// PassphraseFile holds a passphrase in one line.
	PassphraseFile string
}

// kek is a key-encryption key. It is safe for concurrent use.
type kek struct {
	place      string // for people
	secret     []byte
	passphrase bool

	mu sync.Mutex
	// guarded by mu: scrypt is slow, so what it gave is kept. New keys are sealed
	// with the salt that was used last.
	derived map[scryptParams]*derivedKEK
	params  scryptParams
}

type derivedKEK struct {
	aead cipher.AEAD
	id   [kekIDSize]byte
}

// readKEK reads the key that source names. ErrNoKEK: there is no such file.
func readKEK(source KEKSource, dir string) (*kek, error) {
	k := &kek{derived: make(map[scryptParams]*derivedKEK)}
	mode := fs.FileMode(0o600)
	switch {
	case source.PassphraseFile != "":
		k.place, k.passphrase = source.PassphraseFile, true
	case source.Credential != "":
		k.place, mode = source.Credential, 0o640 // the group's bits are the mask of an access list there
	case source.File != "":
		k.place = source.File
	default:
		k.place = filepath.Join(filepath.Dir(dir), KEKFile)
	}
	text, err := readGuarded(k.place, mode, maxSecret)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNoKEK, k.place)
	}
	if err != nil {
		return nil, fmt.Errorf("read the key-encryption key: %w", err)
	}
	if k.secret, err = parseSecret(text, k.passphrase); err != nil {
		return nil, fmt.Errorf("read the key-encryption key: %s: %w", k.place, err)
	}
	return k, nil
}

func parseSecret(text []byte, passphrase bool) ([]byte, error) {
	text = bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r"))
	if passphrase {
		if len(text) < minPassphrase || bytes.ContainsAny(text, "\r\n\x00") {
			return nil, fmt.Errorf("want a passphrase of at least %d bytes in one line", minPassphrase)
		}
		return text, nil
	}
	secret := make([]byte, kekSize)
	if len(text) != hex.EncodedLen(kekSize) {
		return nil, fmt.Errorf("want %d hex digits, as `openssl rand -hex %d` prints them; there are %d bytes", hex.EncodedLen(kekSize), kekSize, len(text))
	}
	if _, err := hex.Decode(secret, text); err != nil {
		return nil, fmt.Errorf("want %d hex digits, as `openssl rand -hex %d` prints them", hex.EncodedLen(kekSize), kekSize)
	}
	return secret, nil
}

// makeKEK makes the key of a first start beside dir and syncs it, before anything
// is sealed with it. Of two that start at once one wins.
func makeKEK(dir string) error {
	secret := make([]byte, kekSize)
	if _, err := rand.Read(secret); err != nil {
		return fmt.Errorf("read randomness: %w", err)
	}
	parent := filepath.Dir(dir)
	temp, err := os.CreateTemp(parent, unfinished+KEKFile+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	_, err = temp.WriteString(hex.EncodeToString(secret) + "\n")
	if err := errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return err
	}
	if err := os.Link(temp.Name(), filepath.Join(parent, KEKFile)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(parent)
}

// prepare fills in how s is sealed, and gives the key that seals it.
func (k *kek) prepare(s *sealedKey) (cipher.AEAD, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.passphrase {
		if k.params.logN == 0 {
			k.params.logN = scryptLogN
			if _, err := rand.Read(k.params.salt[:]); err != nil {
				return nil, fmt.Errorf("read randomness: %w", err)
			}
		}
		s.derivation, s.scrypt = derivedScrypt, k.params
	}
	d, err := k.derive(s.scrypt)
	if err != nil {
		return nil, err
	}
	s.kekID = d.id
	return d.aead, nil
}

// match gives the key that opens s, if it is this one.
func (k *kek) match(s *sealedKey) (cipher.AEAD, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.passphrase != (s.derivation == derivedScrypt) {
		return nil, fmt.Errorf("%w: under a %s, while %s holds a %s", ErrWrongKEK, describe(!k.passphrase), k.place, describe(k.passphrase))
	}
	d, err := k.derive(s.scrypt)
	if err != nil {
		return nil, err
	}
	if d.id != s.kekID {
		return nil, fmt.Errorf("%w: that of %s has ID %x, and the file names %x", ErrWrongKEK, k.place, d.id, s.kekID)
	}
	if k.passphrase {
		k.params = s.scrypt
	}
	return d.aead, nil
}

func describe(passphrase bool) string {
	if passphrase {
		return "passphrase"
	}
	return "key"
}

// derive gives the cipher and the ID of the key. k.mu is held.
func (k *kek) derive(p scryptParams) (*derivedKEK, error) {
	if d := k.derived[p]; d != nil {
		return d, nil
	}
	secret := k.secret
	if k.passphrase {
		var err error
		if secret, err = scrypt.Key(k.secret, p.salt[:], 1<<p.logN, scryptR, scryptP, kekSize); err != nil {
			return nil, fmt.Errorf("derive a key from the passphrase: %w", err)
		}
	}
	d := &derivedKEK{}
	id, err := hkdf.Key(sha256.New, secret, nil, "merlon key-encryption key: ID", kekIDSize)
	if err != nil {
		return nil, err
	}
	copy(d.id[:], id)
	key, err := hkdf.Key(sha256.New, secret, nil, "merlon key-encryption key: AES-256-GCM", kekSize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	if d.aead, err = cipher.NewGCMWithRandomNonce(block); err != nil {
		return nil, err
	}
	k.derived[p] = d
	return d, nil
}

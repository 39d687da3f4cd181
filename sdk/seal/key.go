// The key-encryption key: 32 bytes from a file or a systemd credential, or a
// passphrase. Where none is configured, one is made beside what it seals: that
// protects copies without it, such as backups, and asks nothing of the operator.

package seal

import (
	"bytes"
	"cmp"
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

// KeyFile is the name of the key-encryption key that is made where none is
// configured.
const KeyFile = "kek"

const (
	keySize = 32
	// minPassphrase is short for a secret, and long enough to exclude mistakes.
	minPassphrase = 12
	maxSecret     = 1 << 10
	scryptR       = 8
	scryptP       = 1
	// workFactor is for what is sealed from now on: 128 MiB and half a second.
	workFactor = 17
)

// ErrNoKey is returned when what something is sealed under is not there.
var ErrNoKey = errors.New("the key-encryption key is not there")

// Source says where the key-encryption key is. At most one of the first three is
// set; with none it is where the caller keeps the one that Make made.
type Source struct {
	// File holds 64 hex digits and is readable by its owner alone.
	File string
	// Credential is a file of systemd's, which guards it itself; as File.
	Credential string
	// PassphraseFile holds a passphrase in one line.
	PassphraseFile string
	// WorkFactor is log2 of scrypt's N for what is sealed under a passphrase from
	// now on. Zero means 17; less is for tests.
	WorkFactor byte
}

// credentialsDirectory is where systemd puts credentials.
const credentialsDirectory = "CREDENTIALS_DIRECTORY"

// FromSettings is the source that three settings name, of which two are files and
// one is the name of a systemd credential.
func FromSettings(file, credential, passphraseFile string) (Source, error) {
	s := Source{File: file, PassphraseFile: passphraseFile}
	if credential != "" {
		dir := os.Getenv(credentialsDirectory)
		if dir == "" {
			return s, fmt.Errorf("key_credential: %w: $%s is not set, so systemd passes no credentials", ErrNoKey, credentialsDirectory)
		}
		s.Credential = filepath.Join(dir, credential)
	}
	return s, nil
}

// configured says whether the source names a key.
func (s Source) configured() bool {
	return s.File != "" || s.Credential != "" || s.PassphraseFile != ""
}

// Key is a key-encryption key. It is safe for concurrent use.
type Key struct {
	place      string // for people
	secret     []byte
	passphrase bool
	workFactor byte
	configured bool

	mu sync.Mutex
	// guarded by mu: scrypt is slow, so what it gave is kept. New things are sealed
	// with the salt that was used last.
	derived map[scryptParams]*derivedKey
	params  scryptParams
}

type derivedKey struct {
	aead cipher.AEAD
	id   [keyIDSize]byte
}

// Read reads the key that source names, or else the one that Make made in dir.
// ErrNoKey: there is no such file.
func Read(source Source, dir string) (*Key, error) {
	k := &Key{derived: make(map[scryptParams]*derivedKey), workFactor: cmp.Or(source.WorkFactor, workFactor), configured: source.configured()}
	mode := fs.FileMode(0o600)
	switch {
	case source.PassphraseFile != "":
		k.place, k.passphrase = source.PassphraseFile, true
	case source.Credential != "":
		k.place, mode = source.Credential, 0o640 // the group's bits are the mask of an access list there
	case source.File != "":
		k.place = source.File
	default:
		k.place = filepath.Join(dir, KeyFile)
	}
	text, err := durable.ReadGuarded(k.place, mode, maxSecret)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNoKey, k.place)
	}
	if err != nil {
		return nil, fmt.Errorf("read the key-encryption key: %w", err)
	}
	if k.secret, err = parseSecret(text, k.passphrase); err != nil {
		return nil, fmt.Errorf("read the key-encryption key: %s: %w", k.place, err)
	}
	return k, nil
}

// Place is the file that the key was read from.
func (k *Key) Place() string { return k.place }

// Configured says whether the settings name the key. One that they do not lies
// beside what it seals.
func (k *Key) Configured() bool { return k.configured }

func parseSecret(text []byte, passphrase bool) ([]byte, error) {
	text = bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r"))
	if passphrase {
		if len(text) < minPassphrase || bytes.ContainsAny(text, "\r\n\x00") {
			return nil, fmt.Errorf("want a passphrase of at least %d bytes in one line", minPassphrase)
		}
		return text, nil
	}
	secret := make([]byte, keySize)
	if len(text) != hex.EncodedLen(keySize) {
		return nil, fmt.Errorf("want %d hex digits, as `openssl rand -hex %d` prints them; there are %d bytes", hex.EncodedLen(keySize), keySize, len(text))
	}
	if _, err := hex.Decode(secret, text); err != nil {
		return nil, fmt.Errorf("want %d hex digits, as `openssl rand -hex %d` prints them", hex.EncodedLen(keySize), keySize)
	}
	return secret, nil
}

// Make makes the key of a first start in dir and syncs it, before anything is
// sealed with it. Of two that start at once one wins.
func Make(dir string) error {
	secret := make([]byte, keySize)
	if _, err := rand.Read(secret); err != nil {
		return fmt.Errorf("read randomness: %w", err)
	}
	temp, err := os.CreateTemp(dir, durable.Unfinished+KeyFile+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	_, err = temp.WriteString(hex.EncodeToString(secret) + "\n")
	if err := errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return err
	}
	if err := os.Link(temp.Name(), filepath.Join(dir, KeyFile)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(dir)
}

// prepare fills in how s is sealed, and gives the key that seals it.
func (k *Key) prepare(s *sealed) (cipher.AEAD, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.passphrase {
		if k.params.logN == 0 {
			k.params.logN = k.workFactor
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
	s.keyID = d.id
	return d.aead, nil
}

// match gives the key that opens s, if it is this one.
func (k *Key) match(s *sealed) (cipher.AEAD, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.passphrase != (s.derivation == derivedScrypt) {
		return nil, fmt.Errorf("%w: under a %s, while %s holds a %s", ErrWrongKey, describe(!k.passphrase), k.place, describe(k.passphrase))
	}
	d, err := k.derive(s.scrypt)
	if err != nil {
		return nil, err
	}
	if d.id != s.keyID {
		return nil, fmt.Errorf("%w: that of %s has ID %x, and the file names %x", ErrWrongKey, k.place, d.id, s.keyID)
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
func (k *Key) derive(p scryptParams) (*derivedKey, error) {
	if d := k.derived[p]; d != nil {
		return d, nil
	}
	secret := k.secret
	if k.passphrase {
		var err error
		if secret, err = scrypt.Key(k.secret, p.salt[:], 1<<p.logN, scryptR, scryptP, keySize); err != nil {
			return nil, fmt.Errorf("derive a key from the passphrase: %w", err)
		}
	}
	d := &derivedKey{}
	id, err := hkdf.Key(sha256.New, secret, nil, "merlon key-encryption key: ID", keyIDSize)
	if err != nil {
		return nil, err
	}
	copy(d.id[:], id)
	key, err := hkdf.Key(sha256.New, secret, nil, "merlon key-encryption key: AES-256-GCM", keySize)
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

// Sealed keys: what opens them, what does not, and what the operator is told.

package upstream

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"pgregory.net/rapid"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/seal"
	"merlon.dev/sdk/svid"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(resealForever); dir != "" {
		resealBackAndForth(dir)
	}
	defer stage.RemoveBins() // zlint
	m.Run()
}

// writeFile writes a file of mode 0600 and gives its path.
func writeFile(t testing.TB, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func newKEKFile(t testing.TB, name string) string {
	t.Helper()
	secret := make([]byte, 32)
	rand.Read(secret)
	return writeFile(t, t.TempDir(), name, hex.EncodeToString(secret)+"\n")
}

// phraseSource is a passphrase that is stretched little: half a second is spent
// once, in package seal.
func phraseSource(t testing.TB) seal.Source {
	t.Helper()
	return seal.Source{PassphraseFile: writeFile(t, t.TempDir(), "phrase", "correct horse battery\n"), WorkFactor: 10}
}

func sameKeys(t *testing.T, a, b *Keys) {
	t.Helper()
	kidA, _ := a.Policy()
	kidB, _ := b.Policy()
	if svid.KeyHash(a.X509().Root) != svid.KeyHash(b.X509().Root) || a.X509().ID() != b.X509().ID() || a.JWT().KeyID != b.JWT().KeyID || kidA != kidB {
		t.Error("the keys changed")
	}
}

// Whatever is sealed opens again in its seat, and in no other.
func TestSealedKeysOpenInTheirSeatAlone(t *testing.T) {
	k, err := seal.Read(seal.Source{File: newKEKFile(t, "kek")}, "")
	if err != nil {
		t.Fatal(err)
	}
	seats := rapid.Custom(func(t *rapid.T) seat {
		return seat{
			trustDomain: rapid.SampledFrom([]string{"a.test", "b.test", "a.test1"}).Draw(t, "td"),
			kind:        rapid.SampledFrom([]kind{kindRoot, kindIntermediate, kindJWT, kindPolicy}).Draw(t, "kind"),
			number:      rapid.IntRange(1, 12).Draw(t, "number"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		private := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "private")
		at, other := seats.Draw(t, "seat"), seats.Draw(t, "other seat")
		text, err := sealKey(k, private, at)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := openKey(k, text, at); err != nil || !bytes.Equal(got, private) {
			t.Fatalf("open = %x, %v", got, err)
		}
		if _, err := openKey(k, text, other); other != at && !errors.Is(err, seal.ErrBroken) {
			t.Fatalf("open as %v, sealed as %v: %v", other, at, err)
		}
		for n := range len(text) {
			if _, err := openKey(k, text[:n], at); !errors.Is(err, seal.ErrBroken) {
				t.Fatalf("cut to %d bytes: %v", n, err)
			}
		}
	})
}

func FuzzDecodeSealed(f *testing.F) {
	f.Add(encodeSealed([]byte("sealed")))
	f.Add([]byte("-----BEGIN MERLON SEALED KEY-----\n-----END MERLON SEALED KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		sealed, err := decodeSealed(text)
		if err != nil {
			if !errors.Is(err, seal.ErrBroken) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if !bytes.Equal(encodeSealed(sealed), text) {
			t.Fatalf("accepted %q, which is not what encodeSealed writes", text)
		}
	})
}

func TestKeysOpenUnderEverySource(t *testing.T) {
	credential := newKEKFile(t, "credential")
	if err := os.Chmod(credential, 0o440); err != nil { // as systemd shows it
		t.Fatal(err)
	}
	for name, source := range map[string]seal.Source{
		"made beside the folder": {}, "file": {File: newKEKFile(t, "kek")}, "credential": {Credential: credential}, "passphrase": phraseSource(t),
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			cfg.KEK = source
			first := open(t, cfg)
			sameKeys(t, first, open(t, cfg))
			_, err := os.Stat(filepath.Join(filepath.Dir(cfg.Dir), seal.KeyFile))
			if made := err == nil; made != (source == seal.Source{}) {
				t.Errorf("a key-encryption key was made: %t", made)
			}
		})
	}
}

// No file in the folder holds a private key in clear.
func TestNothingPrivateLiesInClear(t *testing.T) {
	cfg := config(t)
	k := open(t, cfg)
	_, policy := k.Policy()
	secrets := map[string][]byte{}
	for name, signer := range map[string]any{"root": k.root().signer, "intermediate": k.X509().Signer, "jwt": k.JWT().Signer, "policy": policy} {
		key := signer.(*ecdsa.PrivateKey)
		d, err := key.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		secrets[name] = d
	}
	err := filepath.WalkDir(filepath.Dir(cfg.Dir), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if block, _ := pem.Decode(text); block != nil {
			text = append(text, block.Bytes...)
		}
		for name, d := range secrets {
			if bytes.Contains(text, d) {
				t.Errorf("%s holds the %s key", path, name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// unseal makes the folder what an older merlon-ca left: keys in clear.
func unseal(t *testing.T, cfg Config) {
	t.Helper()
	k := open(t, cfg)
	for what, numbers := range k.dir.numbers {
		for _, number := range numbers {
			gen, err := k.dir.load(what, number)
			if err != nil {
				t.Fatal(err)
			}
			der, err := x509.MarshalPKCS8PrivateKey(gen.signer)
			if err != nil {
				t.Fatal(err)
			}
			folder := k.dir.folder(what, number)
			writeFile(t, folder, clearFile, string(pem.EncodeToMemory(&pem.Block{Type: clearType, Bytes: der})))
			if err := os.Remove(filepath.Join(folder, sealedFile)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestKeysInClearAreSealedOnce(t *testing.T) {
	cfg := config(t)
	before := open(t, cfg)
	unseal(t, cfg)
	// The crash that came between the sealed file and the removal of the clear one.
	clear, err := os.ReadFile(filepath.Join(cfg.Dir, "root-1", clearFile))
	if err != nil {
		t.Fatal(err)
	}
	sameKeys(t, before, open(t, cfg))
	writeFile(t, filepath.Join(cfg.Dir, "root-1"), clearFile, string(clear))
	sameKeys(t, before, open(t, cfg))
	if left, _ := filepath.Glob(filepath.Join(cfg.Dir, "*", clearFile)); len(left) > 0 {
		t.Errorf("left in clear: %v", left)
	}
	// A clear key that is another than the sealed one is nobody's to remove.
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		t.Fatal(err)
	}
	path := writeFile(t, filepath.Join(cfg.Dir, "root-1"), clearFile, string(pem.EncodeToMemory(&pem.Block{Type: clearType, Bytes: der})))
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "holds another key") {
		t.Errorf("Open = %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

// Clear keys that make no sense stay as they are.
func TestBrokenKeysInClearAreRefused(t *testing.T) {
	cfg := config(t)
	open(t, cfg)
	unseal(t, cfg)
	path := filepath.Join(cfg.Dir, "root-1", clearFile)
	if err := os.Truncate(path, 60); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "seal "+path) {
		t.Errorf("Open = %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestSealedFilesThatDoNotBelongAreRefused(t *testing.T) {
	path := func(cfg Config, generation string) string { return filepath.Join(cfg.Dir, generation, sealedFile) }
	copyFile := func(from, to string) error {
		text, err := os.ReadFile(from)
		return errors.Join(err, os.WriteFile(to, text, 0o600))
	}
	tests := map[string]struct {
		spoil func(t *testing.T, cfg *Config) error
		want  error
		words string
	}{
		"another key": {func(t *testing.T, cfg *Config) error {
			cfg.KEK = seal.Source{File: newKEKFile(t, "kek2")}
			return nil
		}, seal.ErrWrongKey, "kek2 has ID "},
		"passphrase for a key": {func(t *testing.T, cfg *Config) error {
			cfg.KEK = phraseSource(t)
			return nil
		}, seal.ErrWrongKey, "under a key, while "},
		"no key": {func(_ *testing.T, cfg *Config) error {
			return os.Remove(filepath.Join(filepath.Dir(cfg.Dir), seal.KeyFile))
		}, seal.ErrNoKey, "keys are sealed under it"},
		"configured key missing": {func(_ *testing.T, cfg *Config) error {
			cfg.KEK = seal.Source{File: filepath.Join(cfg.Dir, "..", "nowhere")}
			return nil
		}, seal.ErrNoKey, "nowhere does not exist"},
		"swapped files": {func(_ *testing.T, cfg *Config) error {
			return copyFile(path(*cfg, "policy-1"), path(*cfg, "jwt-1"))
		}, seal.ErrBroken, "jwt-1"},
		"flipped byte": {func(_ *testing.T, cfg *Config) error {
			text, err := os.ReadFile(path(*cfg, "root-1"))
			if err != nil {
				return err
			}
			block, _ := pem.Decode(text)
			block.Bytes[len(block.Bytes)/2] ^= 1
			return os.WriteFile(path(*cfg, "root-1"), pem.EncodeToMemory(block), 0o600)
		}, seal.ErrBroken, "root-1"},
		"truncated": {func(_ *testing.T, cfg *Config) error {
			return os.Truncate(path(*cfg, "root-1"), 70)
		}, seal.ErrBroken, "root-1"},
		"of another trust domain": {func(t *testing.T, cfg *Config) error {
			other := config(t)
			other.TrustDomain = spiffeid.RequireTrustDomainFromString("other.test")
			other.KEK.File = filepath.Join(filepath.Dir(cfg.Dir), seal.KeyFile)
			open(t, other)
			return copyFile(path(other, "root-1"), path(*cfg, "root-1"))
		}, seal.ErrBroken, "for another trust domain"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			open(t, cfg)
			if err := tt.spoil(t, &cfg); err != nil {
				t.Fatal(err)
			}
			_, err := Open(t.Context(), cfg)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.words) {
				t.Errorf("Open = %v; want %q with %q", err, tt.want, tt.words)
			}
		})
	}
}

func TestSecretsThatAreNoneAreRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		text       string
		passphrase bool
		mode       fs.FileMode
		want       string
	}{
		"short key":        {"00ff", false, 0o600, "want 64 hex digits"},
		"not hex":          {strings.Repeat("xy", 32), false, 0o600, "want 64 hex digits"},
		"too long":         {strings.Repeat("00", 33), false, 0o600, "want 64 hex digits"},
		"huge":             {strings.Repeat("0", 2000), false, 0o600, "is larger than"},
		"short passphrase": {"secret\n", true, 0o600, "at least 12 bytes"},
		"two lines":        {"correct horse\nbattery staple\n", true, 0o600, "in one line"},
		"readable":         {strings.Repeat("00", 32), false, 0o644, "run: chmod 0600"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			file := writeFile(t, t.TempDir(), "secret", tt.text)
			if err := os.Chmod(file, tt.mode); err != nil {
				t.Fatal(err)
			}
			cfg.KEK = seal.Source{File: file}
			if tt.passphrase {
				cfg.KEK = seal.Source{PassphraseFile: file}
			}
			if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open = %v; want %q", err, tt.want)
			}
		})
	}
}

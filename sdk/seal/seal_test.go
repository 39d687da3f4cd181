// What is sealed: what opens it, what does not, and what is no secret.

package seal

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func writeFile(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t testing.TB, source Source) *Key {
	t.Helper()
	k, err := Read(source, "")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func keyFile(t testing.TB, digit string) Source {
	return Source{File: writeFile(t, "kek", strings.Repeat(digit, 64)+"\n")}
}

func passphrase(t testing.TB) Source {
	return Source{PassphraseFile: writeFile(t, "phrase", "correct horse battery"), WorkFactor: minLogN}
}

// Whatever is sealed opens again as the same, and as nothing else.
func TestSealedThingsOpenAsTheSameAlone(t *testing.T) {
	keys := []*Key{read(t, keyFile(t, "0")), read(t, passphrase(t))}
	names := rapid.SliceOfN(rapid.SampledFrom([]string{"", "a", "b", "ab"}), 0, 3)
	rapid.Check(t, func(t *rapid.T) {
		k := rapid.SampledFrom(keys).Draw(t, "key")
		secret := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "secret")
		as, other := names.Draw(t, "as"), names.Draw(t, "other")
		b, err := k.Seal(secret, as...)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := k.Open(b, as...); err != nil || !bytes.Equal(got, secret) {
			t.Fatalf("open = %x, %v", got, err)
		}
		if len(secret) > 8 && bytes.Contains(b, secret) {
			t.Fatal("the secret lies in clear")
		}
		if _, err := k.Open(b, other...); strings.Join(other, "\n") != strings.Join(as, "\n") && !errors.Is(err, ErrBroken) {
			t.Fatalf("open as %q, sealed as %q: %v", other, as, err)
		}
		again, err := k.Seal(secret, as...)
		if err != nil || bytes.Equal(again, b) {
			t.Fatalf("sealed twice alike (%v): the nonce is not fresh", err)
		}
	})
}

// Every bit counts.
func TestFlippedBitsAreNoticed(t *testing.T) {
	for _, source := range []Source{keyFile(t, "0"), passphrase(t)} {
		k := read(t, source)
		b, err := k.Seal([]byte("a private key"), "key")
		if err != nil {
			t.Fatal(err)
		}
		for i := range b {
			if i == 2 && k.passphrase {
				continue // the work factor; 2^18 and more take seconds
			}
			for bit := range 8 {
				spoiled := bytes.Clone(b)
				spoiled[i] ^= 1 << bit
				if k.passphrase && i > 2 && i < 2+1+saltSize && bit > 0 {
					continue // another salt is another derivation each
				}
				if _, err := k.Open(spoiled, "key"); !errors.Is(err, ErrBroken) && !errors.Is(err, ErrWrongKey) {
					t.Fatalf("byte %d, bit %d flipped: %v", i, bit, err)
				}
			}
		}
		for n := range b {
			if _, err := k.Open(b[:n], "key"); !errors.Is(err, ErrBroken) {
				t.Fatalf("cut to %d bytes: %v", n, err)
			}
		}
	}
}

func TestAnotherKeyIsTold(t *testing.T) {
	b, err := read(t, keyFile(t, "0")).Seal([]byte("secret"), "key")
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		source Source
		want   string
	}{
		"another key": {keyFile(t, "1"), "has ID "},
		"passphrase":  {passphrase(t), "under a key, while "},
	} {
		if _, err := read(t, tt.source).Open(b, "key"); !errors.Is(err, ErrWrongKey) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Open = %v; want %q", name, err, tt.want)
		}
	}
}

func TestKeyIsMadeOnce(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(Source{}, dir); !errors.Is(err, ErrNoKey) {
		t.Fatalf("Read without a key = %v", err)
	}
	for range 2 { // the second finds the first
		if err := Make(dir); err != nil {
			t.Fatal(err)
		}
	}
	k, err := Read(Source{}, dir)
	if err != nil || k.Configured() || k.Place() != filepath.Join(dir, KeyFile) {
		t.Fatalf("Read = %+v, %v", k, err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("left in the folder: %v, %v", left, err)
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
		"huge":             {strings.Repeat("0", 2000), false, 0o600, "is larger than"},
		"short passphrase": {"secret\n", true, 0o600, "at least 12 bytes"},
		"readable":         {strings.Repeat("00", 32), false, 0o644, "run: chmod 0600"},
	} {
		t.Run(name, func(t *testing.T) {
			file := writeFile(t, "secret", tt.text)
			if err := os.Chmod(file, tt.mode); err != nil {
				t.Fatal(err)
			}
			source := Source{File: file}
			if tt.passphrase {
				source = Source{PassphraseFile: file}
			}
			if _, err := Read(source, ""); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Read = %v; want %q", err, tt.want)
			}
		})
	}
}

// What is shipped is not what the other tests use.
func TestPassphrasesAreStretched(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a second")
	}
	source := passphrase(t)
	source.WorkFactor = 0
	b, err := read(t, source).Seal([]byte("secret"), "key")
	if err != nil {
		t.Fatal(err)
	}
	s, err := decode(b)
	if err != nil || s.scrypt.logN != 17 || s.scrypt.salt == [saltSize]byte{} {
		t.Errorf("sealed with %+v, %v", s, err)
	}
}

func TestCredentialIsSystemds(t *testing.T) {
	t.Setenv(credentialsDirectory, "")
	if _, err := FromSettings("", "kek", ""); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), credentialsDirectory) {
		t.Errorf("without systemd: %v", err)
	}
	t.Setenv(credentialsDirectory, "/run/credentials/x")
	if s, err := FromSettings("", "kek", ""); err != nil || s.Credential != "/run/credentials/x/kek" {
		t.Errorf("FromSettings = %+v, %v", s, err)
	}
}

func FuzzDecode(f *testing.F) {
	b, err := read(f, keyFile(f, "0")).Seal([]byte("a private key"), "key")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add((&sealed{derivation: derivedScrypt, scrypt: scryptParams{logN: 17}, box: make([]byte, 40)}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decode(b)
		if err != nil {
			return
		}
		if !bytes.Equal(s.encode(), b) {
			t.Fatalf("accepted %x, which is not what encode writes", b)
		}
		if s.derivation == derivedScrypt && (s.scrypt.logN < minLogN || s.scrypt.logN > maxLogN) {
			t.Fatalf("accepted N = 2^%d", s.scrypt.logN)
		}
	})
}

func FuzzParseSecret(f *testing.F) {
	f.Add([]byte(strings.Repeat("0f", 32)+"\n"), false)
	f.Add([]byte("correct horse battery\r\n"), true)
	f.Add([]byte(hex.EncodeToString([]byte("x"))), false)
	f.Fuzz(func(t *testing.T, text []byte, passphrase bool) {
		secret, err := parseSecret(text, passphrase)
		if err != nil {
			return
		}
		if passphrase && len(secret) < minPassphrase || !passphrase && len(secret) != keySize {
			t.Fatalf("parseSecret(%q, %t) has %d bytes", text, passphrase, len(secret))
		}
	})
}

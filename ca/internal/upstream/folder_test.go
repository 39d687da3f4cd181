// The folder of the keys: who may read it, what must be in it, and that nothing
// half made is ever used.

package upstream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

func TestFilesAreForTheOwnerAlone(t *testing.T) {
	cfg := config(t)
	open(t, cfg)
	err := filepath.WalkDir(cfg.Dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		want := os.FileMode(0o600)
		if e.IsDir() {
			want = 0o700
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %#o; want %#o", path, info.Mode().Perm(), want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestLooseModesAreRefusedWithTheCommandToRun(t *testing.T) {
	tests := map[string]struct {
		path string
		mode os.FileMode
		want string
	}{
		"readable key":         {"root-1/key.sealed", 0o640, "run: chmod 0600 "},
		"writable certificate": {"intermediate-1/cert.pem", 0o602, "run: chmod 0600 "},
		"open folder":          {"", 0o755, "run: chmod 0700 "},
		"open generation":      {"jwt-1", 0o710, "run: chmod 0700 "},
		"policy key":           {"policy-1/key.sealed", 0o604, "run: chmod 0600 "},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			open(t, cfg)
			path := filepath.Join(cfg.Dir, tt.path)
			if err := os.Chmod(path, tt.mode); err != nil {
				t.Fatal(err)
			}
			_, err := Open(t.Context(), cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want+path) {
				t.Errorf("Open = %v; want %q", err, tt.want+path)
			}
		})
	}
}

func TestBrokenFoldersAreRefused(t *testing.T) {
	tests := map[string]struct {
		spoil func(dir string) error
		want  string
	}{
		"root lost": {
			func(dir string) error { return os.RemoveAll(filepath.Join(dir, "root-1")) }, "the root is missing",
		},
		"half a generation": {
			func(dir string) error { return os.Remove(filepath.Join(dir, "root-1", sealedFile)) }, "no such file",
		},
		"key of another generation": {
			func(dir string) error {
				key, err := os.ReadFile(filepath.Join(dir, "jwt-1", sealedFile))
				if err != nil {
					return err
				}
				return os.WriteFile(filepath.Join(dir, "intermediate-1", sealedFile), key, 0o600)
			}, "sealed as something else",
		},
		"foreign file": {
			func(dir string) error { return os.WriteFile(filepath.Join(dir, "notes.txt"), nil, 0o600) }, "notes.txt does not belong here",
		},
		"symlinked key": {
			func(dir string) error {
				if err := os.Rename(filepath.Join(dir, "root-1", sealedFile), filepath.Join(dir, "..", "k")); err != nil {
					return err
				}
				return os.Symlink(filepath.Join(dir, "..", "k"), filepath.Join(dir, "root-1", sealedFile))
			}, "symbolic links",
		},
		"torn key": {
			func(dir string) error { return os.Truncate(filepath.Join(dir, "root-1", sealedFile), 60) }, "load ",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := config(t)
			open(t, cfg)
			if err := tt.spoil(cfg.Dir); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open = %v; want %q", err, tt.want)
			}
		})
	}
}

func TestIntermediatesOfOtherRootsAreRefused(t *testing.T) {
	cfg, other := config(t), config(t)
	cfg.KEK.File = newKEKFile(t, "kek")
	other.KEK = cfg.KEK
	open(t, cfg)
	open(t, other)
	mine, theirs := filepath.Join(cfg.Dir, "intermediate-1"), filepath.Join(other.Dir, "intermediate-1")
	if err := errors.Join(os.RemoveAll(mine), os.Rename(theirs, mine)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not the root's") {
		t.Errorf("Open = %v", err)
	}
}

func TestJWTAndPolicyKeysAreOfTheirKind(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for what, want := range map[kind]string{kindJWT: "neither a P-256 key", kindPolicy: "not a P-256 key"} {
		cfg := config(t)
		if _, err := open(t, cfg).dir.add(what, madeKey{signer: key, private: key}, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open with a %s key on P-384 = %v", what, err)
		}
	}
}

func TestKeysOfOtherUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files away")
	}
	cfg := config(t)
	open(t, cfg)
	if err := os.Chown(filepath.Join(cfg.Dir, "root-1", sealedFile), 12345, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "run: chown 0 ") {
		t.Errorf("Open = %v", err)
	}
}

func TestFolderKeepsToItsPurpose(t *testing.T) {
	cfg := config(t)
	open(t, cfg)
	other := cfg
	other.TrustDomain = spiffeid.RequireTrustDomainFromString("evil.org")
	if _, err := Open(t.Context(), other); err == nil || !strings.Contains(err.Error(), "another trust domain") {
		t.Errorf("Open for another trust domain = %v", err)
	}
	other = cfg
	other.Development = true
	if _, err := Open(t.Context(), other); err == nil || !strings.Contains(err.Error(), "development") {
		t.Errorf("Open as development = %v", err)
	}
}

// A crash at any point of first use leaves a folder that opens, with whatever was
// finished before it.
func TestUnfinishedGenerationsAreNeverUsed(t *testing.T) {
	cfg := config(t)
	k := open(t, cfg)
	for _, lost := range [][]string{{"intermediate-1"}, {"intermediate-1", "policy-1"}, {"intermediate-1", "policy-1", "jwt-1"}} {
		for _, name := range lost { // what the crash came before
			if err := os.RemoveAll(filepath.Join(cfg.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		half := filepath.Join(cfg.Dir, unfinished+"123")
		if err := os.Mkdir(half, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(half, sealedFile), []byte("-----BEGIN PRIV"), 0o600); err != nil {
			t.Fatal(err)
		}
		again := open(t, cfg)
		if svid.KeyHash(again.X509().Root) != svid.KeyHash(k.X509().Root) {
			t.Error("the root changed")
		}
		if _, err := os.Stat(half); !os.IsNotExist(err) {
			t.Errorf("the unfinished generation is still there: %v", err)
		}
		if _, err := verify(t, again, issue(t, again, "/web")); err != nil {
			t.Error(err)
		}
	}
}

// Two processes that start on one empty folder do not end up with two roots.
func TestConcurrentFirstUseMakesOneRoot(t *testing.T) {
	cfg := config(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { // as a CA does it: losers fail, nobody may win twice
			lock, err := Lock(cfg.Dir)
			if err != nil {
				return
			}
			defer lock.Close()
			_, _ = Open(context.WithoutCancel(t.Context()), cfg)
		})
	}
	wg.Wait()
	open(t, cfg)
	if got := generations(t, cfg.Dir); !slices.Contains(got, "root-1") || slices.Contains(got, "root-2") {
		t.Errorf("on disk: %v; want one root", got)
	}
}

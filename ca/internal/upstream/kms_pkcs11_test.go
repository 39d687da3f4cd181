//go:build pkcs11

// Keys in a PKCS #11 token, of SoftHSM: they are made there, used there, and
// nothing of them can be read.

package upstream

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ThalesGroup/crypto11"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// newToken makes a token called merlon and gives its URI.
func newToken(t *testing.T) (uri, pinFile string) {
	t.Helper()
	util, err := exec.LookPath("softhsm2-util")
	if err != nil {
		t.Skip("SoftHSM is not installed: apt-get install softhsm2")
	}
	dir := t.TempDir()
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", writeFile(t, dir, "softhsm2.conf", "directories.tokendir = "+tokens+"\nobjectstore.backend = file\n"))
	out, err := exec.CommandContext(t.Context(), util, "--init-token", "--free", "--label", "merlon", "--so-pin", "4321", "--pin", "1234").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pinFile = writeFile(t, dir, "pin", "1234")
	return "pkcs11:module-path=" + softHSM + ";token=merlon?pin-source=" + pinFile, pinFile
}

// inToken looks at the token past the CA.
func inToken(t *testing.T) (*crypto11.Context, []crypto11.Signer) {
	t.Helper()
	p11, err := crypto11.Configure(&crypto11.Config{Path: softHSM, TokenLabel: "merlon", Pin: "1234"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p11.Close() })
	keys, err := p11.FindAllKeyPairs()
	if err != nil {
		t.Fatal(err)
	}
	return p11, keys
}

func openToken(t *testing.T, cfg Config) *Keys {
	t.Helper()
	k := open(t, cfg)
	t.Cleanup(func() { k.Close() })
	return k
}

func TestPKCS11KeysAreMadeAndUsedInTheToken(t *testing.T) {
	cfg := config(t)
	cfg.KMS.URI, _ = newToken(t)
	k := openToken(t, cfg)
	if _, err := verify(t, k, issue(t, k, "/web", "web.internal")); err != nil {
		t.Error(err)
	}
	digest := sha256.Sum256([]byte("x"))
	signature, err := k.JWT().Signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if key, ok := k.JWT().Signer.Public().(*ecdsa.PublicKey); err != nil || !ok || !ecdsa.VerifyASN1(key, digest[:], signature) {
		t.Errorf("sign by the JWT key: %v", err)
	}
	if seal, err := k.Seal([]byte("token")); err != nil || !k.Sealed([]byte("token"), seal) {
		t.Errorf("seal by the root's key: %v", err)
	}
	sameKeys(t, k, openToken(t, cfg))

	p11, keys := inToken(t)
	if len(keys) != 4 {
		t.Errorf("%d keys in the token; want 4", len(keys))
	}
	for _, key := range keys {
		attrs, err := p11.GetAttributes(key, []crypto11.AttributeType{crypto11.CkaSensitive, crypto11.CkaExtractable, crypto11.CkaNeverExtractable})
		if err != nil {
			t.Fatal(err)
		}
		for attr, want := range map[crypto11.AttributeType][]byte{crypto11.CkaSensitive: {1}, crypto11.CkaExtractable: {0}, crypto11.CkaNeverExtractable: {1}} {
			if got := attrs[attr]; got == nil || !bytes.Equal(got.Value, want) {
				t.Errorf("attribute %#x = %v; want %v: the key can leave the token", attr, got, want)
			}
		}
		if value, err := p11.GetAttribute(key, crypto11.CkaValue); err == nil {
			t.Errorf("the token gave the private key away: %d bytes", len(value.Value))
		}
	}
	sealed, _ := filepath.Glob(filepath.Join(cfg.Dir, "*", sealedFile))
	if want := []string{filepath.Join(cfg.Dir, "log-1", sealedFile)}; !slices.Equal(sealed, want) {
		t.Errorf("keys in files: %v; want that of the log alone", sealed)
	}
}

// Renewal leaves no key of an old intermediate behind, nor one that nobody
// certified.
func TestPKCS11TokenHoldsNoKeysForNothing(t *testing.T) {
	root := open(t, config(t))
	cfg := config(t)
	cfg.KMS.URI, _ = newToken(t)
	holder := &holder{t: t, keys: root, name: "ca-2"}
	cfg.RootHolder = holder
	k := openToken(t, cfg)
	if _, keys := inToken(t); len(keys) != 3 { // intermediate, jwt, policy
		t.Fatalf("%d keys in the token; want 3", len(keys))
	}
	later := time.Now().Add(13 * time.Hour)
	for _, alter := range []func(*Certificates){
		func(c *Certificates) { c.Root = c.Policy }, func(c *Certificates) { c.Intermediate = c.Root }, func(c *Certificates) { c.Policy = c.Root },
	} {
		holder.alter = alter
		if _, err := k.RenewIntermediate(t.Context(), later); err == nil {
			t.Fatal("renewed with an answer that is wrong")
		}
	}
	if _, keys := inToken(t); len(keys) != 4 {
		t.Errorf("%d keys in the token after renewals that failed; want one more, which is asked for again", len(keys))
	}
	holder.alter = nil
	if renewed, err := k.RenewIntermediate(t.Context(), later); err != nil || !renewed {
		t.Fatalf("RenewIntermediate = %t, %v", renewed, err)
	}
	if _, keys := inToken(t); len(keys) != 3 {
		t.Errorf("%d keys in the token after a renewal; want 3", len(keys))
	}
	if _, err := verify(t, root, issue(t, k, "/web")); err != nil {
		t.Error(err)
	}
	holder.alter = func(c *Certificates) { c.Root = c.Policy }
	if _, err := k.RenewIntermediate(t.Context(), later.Add(24*time.Hour)); err == nil {
		t.Fatal("renewed with an answer that is wrong")
	}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if _, keys := inToken(t); len(keys) != 3 {
		t.Errorf("%d keys in the token after the end; want 3", len(keys))
	}
}

// Keys that follow each other are made in the token, and leave it when they are
// revoked.
func TestPKCS11KeysAreReplacedInTheToken(t *testing.T) {
	cfg := config(t)
	cfg.KMS.URI, _ = newToken(t)
	k := openToken(t, cfg)
	oldRoot, oldJWT := rootID(k.X509().Root), k.JWT().KeyID
	root, err := k.PrepareRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	jwt, err := k.PrepareJWT()
	if err != nil {
		t.Fatal(err)
	}
	if _, keys := inToken(t); len(keys) != 6 {
		t.Errorf("%d keys in the token; want 6", len(keys))
	}
	if changed, err := k.UseRoot(t.Context(), rootID(root.Certificate), time.Now()); err != nil || !changed {
		t.Fatalf("UseRoot = %t, %v", changed, err)
	}
	if err := k.UseJWT(jwt.KeyID); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{oldRoot, oldJWT} {
		if found, err := k.Discard(id); err != nil || !found {
			t.Errorf("Discard(%s) = %t, %v", id, found, err)
		}
	}
	if _, keys := inToken(t); len(keys) != 4 {
		t.Errorf("%d keys in the token; want 4", len(keys))
	}
	if _, err := verify(t, k, issue(t, k, "/web")); err != nil || !k.X509().Root.Equal(root.Certificate) {
		t.Errorf("under the new root: %v", err)
	}
	sameKeys(t, k, openToken(t, cfg))
}

func TestPKCS11RootAloneInTheToken(t *testing.T) {
	cfg := config(t)
	cfg.KMS.URI, _ = newToken(t)
	cfg.KMS.Keys = []string{"root"}
	k := openToken(t, cfg)
	if _, err := verify(t, k, issue(t, k, "/web")); err != nil {
		t.Error(err)
	}
	if _, keys := inToken(t); len(keys) != 1 {
		t.Errorf("%d keys in the token; want the root's", len(keys))
	}
	var files []string
	for _, pattern := range []string{sealedFile, uriFile} {
		found, _ := filepath.Glob(filepath.Join(cfg.Dir, "*", pattern))
		for _, f := range found {
			files = append(files, strings.TrimPrefix(f, cfg.Dir+"/"))
		}
	}
	slices.Sort(files)
	if want := []string{"intermediate-1/key.sealed", "jwt-1/key.sealed", "log-1/key.sealed", "policy-1/key.sealed", "root-1/key.uri"}; !slices.Equal(files, want) {
		t.Errorf("files %v; want %v", files, want)
	}
	// What was made in files before stays there; the next of its kind is not.
	cfg.KMS.Keys = nil
	again := openToken(t, cfg)
	sameKeys(t, k, again)
	if _, err := again.RenewIntermediate(t.Context(), time.Now().Add(13*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, "intermediate-2", uriFile)); err != nil {
		t.Error(err)
	}
}

func TestPKCS11Refusals(t *testing.T) {
	cfg := config(t)
	uri, pinFile := newToken(t)
	cfg.KMS.URI = uri
	if err := open(t, cfg).Close(); err != nil { // the login is that of the process
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		spoil func(cfg *Config)
		want  string
	}{
		"not configured": {func(cfg *Config) { cfg.KMS.URI = "" }, "the key is in a KMS: pkcs11:"},
		"wrong PIN": {func(cfg *Config) {
			cfg.KMS.URI = strings.Replace(uri, pinFile, writeFile(t, t.TempDir(), "pin", "9999"), 1)
		}, "PIN"},
		"no PIN file": {func(cfg *Config) { cfg.KMS.URI = uri + ".not" }, "read its PIN"},
		"other token": {func(cfg *Config) { cfg.KMS.URI = strings.Replace(uri, "token=merlon", "token=other", 1) }, "open the KMS pkcs11"},
		"readable PIN": {func(cfg *Config) {
			loose := writeFile(t, t.TempDir(), "pin", "1234")
			os.Chmod(loose, 0o644)
			cfg.KMS.URI = strings.Replace(uri, pinFile, loose, 1)
		}, "run: chmod 0600"},
	} {
		spoiled := cfg
		tt.spoil(&spoiled)
		if _, err := Open(t.Context(), spoiled); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: Open = %v; want %q", name, err, tt.want)
		}
	}
	_, keys := inToken(t)
	for _, key := range keys {
		if err := key.Delete(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "find the key pkcs11:") {
		t.Errorf("key gone: Open = %v", err)
	}
}

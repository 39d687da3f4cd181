// Where private keys are, and where they never are.

package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca"
	"merlon.dev/ca/internal/offline"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/badger"
	"merlon.dev/ca/internal/upstream"
)

// plantKeys puts a root, a JWT key and a policy key in clear where an older
// merlon-ca had them.
func plantKeys(t *testing.T, keys string) map[string]*ecdsa.PrivateKey {
	t.Helper()
	planted := make(map[string]*ecdsa.PrivateKey)
	for name, curve := range map[string]elliptic.Curve{"root": elliptic.P384(), "jwt": elliptic.P256(), "policy": elliptic.P256()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		planted[name] = key
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		plant(t, filepath.Join(keys, name+"-1", "key.pem"), "PRIVATE KEY", der)
	}
	key := planted["root"]
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "old root", Organization: []string{"Merlon development root - do not trust"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLen: 1, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "shop.test"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	plant(t, filepath.Join(keys, "root-1", "cert.pem"), "CERTIFICATE", der)
	return planted
}

func plant(t *testing.T, path, blockType string, der []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: blockType, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// secretOf is what of a private key is secret.
func secretOf(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	if key, ok := key.(ed25519.PrivateKey); ok {
		return key.Seed()
	}
	d, err := key.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// holds says whether data has the secret d in some common form.
func holds(data, d []byte) bool {
	forms := [][]byte{d, []byte(hex.EncodeToString(d)), []byte(strings.ToUpper(hex.EncodeToString(d)))}
	for skip := range 3 { // base64 of it behind anything
		cut := d[skip:]
		cut = cut[:len(cut)/3*3]
		forms = append(forms, []byte(base64.StdEncoding.EncodeToString(cut)), []byte(base64.URLEncoding.EncodeToString(cut)))
	}
	for _, form := range forms {
		if bytes.Contains(data, form) {
			return true
		}
	}
	return false
}

// T42: a private key is in the folder of keys alone, and sealed there: not in the
// store's files, its values, a backup or the audit log.
func TestPrivateKeysNeverEnterTheStore(t *testing.T) {
	dir := tempDir(t)
	data := filepath.Join(dir, "data")
	private := plantKeys(t, filepath.Join(data, "keys"))
	if grep(t, data, "BEGIN PRIVATE KEY") == "" {
		t.Fatal("the planted keys are not found") // or the search below would prove nothing
	}
	c := startCA(t, dir)
	c.entry("node", "web")
	pushPolicy(t, c)
	c.stop()

	td := spiffeid.RequireTrustDomainFromString("shop.test")
	keys, err := upstream.Open(t.Context(), upstream.Config{TrustDomain: td, Dir: filepath.Join(data, "keys"), Development: true})
	if err != nil {
		t.Fatal(err)
	}
	_, policy := keys.Policy()
	if !private["policy"].PublicKey.Equal(policy.Public()) || !private["jwt"].PublicKey.Equal(keys.JWT().Signer.Public()) || !private["root"].PublicKey.Equal(keys.X509().Root.PublicKey) {
		t.Fatal("the CA did not take the planted keys")
	}
	secrets := map[string][]byte{"intermediate": secretOf(t, keys.X509().Signer), "log": secretOf(t, keys.Log())}
	for name, key := range private {
		secrets[name] = secretOf(t, key)
	}

	cfg := ca.Config{TrustDomain: "shop.test", DataDir: data, Store: "badger"}
	backup, err := os.Create(filepath.Join(data, "a.backup"))
	if err != nil {
		t.Fatal(err)
	}
	defer backup.Close()
	if _, err := offline.Backup(t.Context(), cfg, backup); err != nil {
		t.Fatal(err)
	}
	for name, secret := range secrets {
		searchFiles(t, data, name, secret)
		searchValues(t, filepath.Join(data, "store"), name, secret)
	}
}

func searchFiles(t *testing.T, dir, name string, secret []byte) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if block, _ := pem.Decode(b); block != nil {
			b = append(b, block.Bytes...)
		}
		if holds(b, secret) {
			t.Errorf("%s holds the %s key", path, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// searchValues looks behind Badger's compression.
func searchValues(t *testing.T, dir, name string, secret []byte) {
	t.Helper()
	st, err := badger.Open(dir, badger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	found := 0
	for _, planted := range []bool{false, true} {
		if planted { // what the search would find
			if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put("planted/"+name, []byte("key: "+base64.StdEncoding.EncodeToString(secret)))}, nil); err != nil {
				t.Fatal(err)
			}
		}
		kvs, _, more, err := st.List(t.Context(), "", "", 1000, 0)
		if err != nil || more {
			t.Fatalf("list: %v, more %t", err, more)
		}
		for _, kv := range kvs {
			if holds(kv.Value, secret) {
				found++
				if !strings.HasPrefix(kv.Key, "planted/") {
					t.Errorf("the store holds the %s key in %s", name, kv.Key)
				}
			}
		}
	}
	if found != 1 {
		t.Errorf("found the %s key in %d values; want the planted one alone", name, found)
	}
}

// What the operator reads when a CA cannot open its keys.
func TestKeysThatDoNotOpenAreExplained(t *testing.T) {
	dir := tempDir(t)
	startCA(t, dir).stop()
	kek := filepath.Join(dir, "data", "kek")
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte(strings.Repeat("42", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(change func(*ca.Config)) error {
		cfg := ca.Config{
			TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data"), AdminSocket: filepath.Join(dir, "s", "a.sock"),
			Address: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", HealthAddress: "127.0.0.1:0", Development: true,
		}
		change(&cfg)
		srv, err := ca.New(cfg)
		if err != nil {
			return err
		}
		return srv.Run(t.Context())
	}
	wrong := run(func(cfg *ca.Config) { cfg.KeyFile = other })
	credential := run(func(cfg *ca.Config) { cfg.KeyCredential = "kek" })
	if err := os.Rename(kek, kek+".away"); err != nil {
		t.Fatal(err)
	}
	lost := run(func(*ca.Config) {})
	for name, tt := range map[string]struct {
		err         error
		words, hint string
	}{
		"wrong":      {wrong, "sealed under another key-encryption key", "merlon key reseal"},
		"credential": {credential, "$CREDENTIALS_DIRECTORY is not set", "key_credential"},
		"lost":       {lost, kek + " does not exist, and keys are sealed under it", "put it back"},
	} {
		if tt.err == nil || !strings.Contains(tt.err.Error(), tt.words) || !strings.Contains(ca.Hint(tt.err), tt.hint) {
			t.Errorf("%s: %v\nhint: %s", name, tt.err, ca.Hint(tt.err))
		}
	}
	if err := os.Rename(kek+".away", kek); err != nil {
		t.Fatal(err)
	}
	c := startCA(t, dir)
	cfg := ca.Config{TrustDomain: "shop.test", DataDir: filepath.Join(dir, "data")}
	if _, err := offline.ResealKeys(t.Context(), cfg, ca.Config{TrustDomain: "shop.test", DataDir: cfg.DataDir, KeyFile: other}); err == nil || !strings.Contains(ca.Hint(err), "stop the merlon-ca") {
		t.Errorf("reseal under a running CA: %v, hint %q", err, ca.Hint(err))
	}
	c.stop()
	if done, err := offline.ResealKeys(t.Context(), cfg, ca.Config{TrustDomain: "shop.test", DataDir: cfg.DataDir, KeyFile: other}); err != nil || done.Sealed != 5 {
		t.Fatalf("ResealKeys = %+v, %v", done, err)
	}
	startCA(t, dir, func(cfg *ca.Config) { cfg.KeyFile = other }).stop()
}

// What the agent makes of the files that an operator gives it.

package attest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/ca/capb"
)

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestJoinTokenIsReadAtEachTry(t *testing.T) {
	j := &JoinToken{File: filepath.Join(t.TempDir(), "token")}
	evidence := func() (string, error) {
		req := &capb.AttestRequest{}
		err := j.Evidence(t.Context(), tls.ConnectionState{}, req)
		return req.GetJoinToken(), err
	}
	if _, err := evidence(); !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "merlon token create") {
		t.Errorf("without a file: %v; want ErrNone and what to do", err)
	}
	for content, want := range map[string]string{"mjt-abc\n": "mjt-abc", "  mjt-def": "mjt-def"} {
		if err := os.WriteFile(j.File, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := evidence(); got != want || err != nil {
			t.Errorf("file %q: token %q, %v; want %q", content, got, err, want)
		}
	}
	if err := os.WriteFile(j.File, make([]byte, maxTokenBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := evidence(); err == nil || !strings.Contains(err.Error(), "more than 4096 bytes") {
		t.Errorf("a file that is too large: %v", err)
	}
	if err := os.WriteFile(j.File, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := evidence(); !errors.Is(err, ErrNone) {
		t.Errorf("an empty file: %v; want ErrNone", err)
	}
}

func certificate(t *testing.T, name string, key, by *ecdsa.PrivateKey, issuer *x509.Certificate) *x509.Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	if issuer == nil {
		issuer = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), by)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func certPEM(certs ...*x509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func TestCertificateAndKeyAreRead(t *testing.T) {
	rootKey, key := newKey(t), newKey(t)
	root := certificate(t, "root", rootKey, rootKey, nil)
	leaf := certificate(t, "node", key, rootKey, root)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	cert, keyFile := write(t, "cert.pem", certPEM(leaf, root)), write(t, "key.pem", keyPEM)
	both := write(t, "both.pem", append(certPEM(leaf), keyPEM...))
	for name, x := range map[string]*X509POP{"two files": {cert, keyFile}, "one file": {both, both}} {
		chain, got, err := x.read()
		if err != nil || len(chain) != 1 || string(chain[0]) != string(leaf.Raw) || !key.Public().(*ecdsa.PublicKey).Equal(got.Public()) {
			t.Errorf("%s: %d certificates, %v; want the leaf without its root, and its key", name, len(chain), err)
		}
	}
	other := newKey(t)
	long := []*x509.Certificate{leaf}
	for range maxPOPChain {
		long = append(long, certificate(t, "above", other, rootKey, root))
	}
	missing := filepath.Join(t.TempDir(), "none.pem")
	for name, x := range map[string]*X509POP{
		"no certificate": {missing, keyFile}, "no key": {cert, missing}, "no PEM": {write(t, "x", []byte("x")), keyFile},
		"another's key": {write(t, "c", certPEM(root)), keyFile}, "too long a chain": {write(t, "long.pem", certPEM(long...)), keyFile},
		"too large": {write(t, "large", make([]byte, maxPEMBytes+1)), keyFile},
	} {
		if _, _, err := x.read(); err == nil || !strings.Contains(err.Error(), "node's") {
			t.Errorf("%s: error %v; want one that says what was read", name, err)
		}
	}
}

func TestTokenOfThePodIsReadAtEachTry(t *testing.T) {
	k := &K8s{Cluster: "prod", TokenFile: filepath.Join(t.TempDir(), "token")}
	evidence := func() (*capb.K8SToken, error) {
		req := &capb.AttestRequest{}
		err := k.Evidence(t.Context(), tls.ConnectionState{}, req)
		return req.GetK8S(), err
	}
	if _, err := evidence(); err == nil || !strings.Contains(err.Error(), "serviceAccountToken") {
		t.Errorf("without a file: %v; want what to do", err)
	}
	for _, want := range []string{"first", "second"} {
		if err := os.WriteFile(k.TokenFile, []byte(want+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := evidence(); got.GetToken() != want || got.GetCluster() != "prod" || err != nil {
			t.Errorf("evidence = %v, %v; want %q for prod", got, err, want)
		}
	}
	for name, content := range map[string][]byte{"empty": nil, "too large": make([]byte, maxK8sToken+1)} {
		if err := os.WriteFile(k.TokenFile, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := evidence(); err == nil {
			t.Errorf("%s: evidence = %v; want an error", name, got)
		}
	}
}

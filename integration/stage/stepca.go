// A real step-ca, which signs the intermediates of a CA of ours.

package stage

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Provisioners of StepCA: one by whose template it signs intermediates of the trust
// domain shop.test, and one without a template, which signs leaves.
const (
	StepIntermediates = "merlon"
	StepLeaves        = "leaves"
)

// stepTemplate is the one in ca/README.md.
const stepTemplate = `{
  "subject": {{ toJson .Insecure.CR.Subject }},
  "sans": {{ toJson .SANs }},
  "keyUsage": ["certSign", "crlSign"],
  "basicConstraints": {"isCA": true, "maxPathLen": 0},
  "nameConstraints": {"critical": true, "permittedURIDomains": ["shop.test"]}
}`

// StepCA is a running step-ca. Its methods are for one goroutine.
type StepCA struct {
	Root *x509.Certificate

	tb      testing.TB
	bin     string
	dir     string
	address string
	cmd     *exec.Cmd
	stdin   io.Closer
	log     Buffer
}

// StartStepCA starts step-ca on loopback. It ends with the test.
func StartStepCA(tb testing.TB) *StepCA {
	tb.Helper()
	dir, err := binDir()
	if err != nil {
		tb.Fatal(err)
	}
	s := &StepCA{
		tb: tb, bin: filepath.Join(dir, Build(tb, "stepca", "integration/stepca", "")), dir: Dir(tb),
		address: fmt.Sprintf("127.0.0.1:%d", FreePort(tb)),
	}
	s.configure()
	tb.Cleanup(func() {
		s.Kill()
		if tb.Failed() {
			tb.Logf("log of step-ca:\n%s", tail(s.log.String()))
		}
	})
	s.Start()
	return s
}

// Settings are the lines of a configuration of merlon-ca below this step-ca.
func (s *StepCA) Settings(provisioner string) []string {
	return []string{
		"upstream: stepcas", "upstream_root_file: " + s.file("root.pem"), "upstream_address: https://" + s.address,
		"upstream_key_file: " + s.file("provisioner.key"), "upstream_provisioner: " + provisioner,
	}
}

func (s *StepCA) file(name string) string { return filepath.Join(s.dir, name) }

// Start starts it, or starts it again.
func (s *StepCA) Start() {
	s.tb.Helper()
	s.cmd = exec.Command(s.bin, s.file("ca.json"))
	s.cmd.Env = append(os.Environ(), "STEPPATH="+s.dir)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	var err error
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		s.tb.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.tb.Fatal(err)
	}
	Eventually(s.tb, "step-ca listens", func() error {
		conn, err := net.Dial("tcp", s.address)
		if err != nil {
			return fmt.Errorf("%w: %s", err, s.log.String())
		}
		return conn.Close()
	})
}

// Kill ends it with SIGKILL.
func (s *StepCA) Kill() {
	if s.cmd == nil {
		return
	}
	s.cmd.Process.Kill()
	s.cmd.Wait()
	s.cmd = nil
}

// configure makes a root, an intermediate below which there may be one more, a
// provisioner's key and the configuration.
func (s *StepCA) configure() {
	s.tb.Helper()
	rootKey, caKey, provisioner := s.key("root.key"), s.key("ca.key"), s.key("provisioner.key")
	root := stepAuthority("Step Root", 1)
	s.Root = s.certificate("root.pem", root, root, rootKey, rootKey)
	intermediate := stepAuthority("Step Intermediate", 2)
	intermediate.MaxPathLen = 1 // `step ca init` says 0, which allows no CA below
	s.certificate("ca.pem", intermediate, s.Root, caKey, rootKey)

	jwk := jose.JSONWebKey{Key: provisioner.Public(), Algorithm: "ES256", Use: "sig"}
	thumbprint, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		s.tb.Fatal(err)
	}
	jwk.KeyID = base64.RawURLEncoding.EncodeToString(thumbprint)
	config, err := json.Marshal(map[string]any{
		"root": s.file("root.pem"), "crt": s.file("ca.pem"), "key": s.file("ca.key"),
		"address": s.address, "dnsNames": []string{"127.0.0.1", "localhost"}, "logger": map[string]any{"format": "text"},
		"authority": map[string]any{"provisioners": []any{
			map[string]any{"type": "JWK", "name": StepIntermediates, "key": jwk, "claims": map[string]any{"minTLSCertDuration": "1s"}, "options": map[string]any{"x509": map[string]any{"template": stepTemplate}}},
			map[string]any{"type": "JWK", "name": StepLeaves, "key": jwk},
		}},
	})
	if err != nil {
		s.tb.Fatal(err)
	}
	if err := os.WriteFile(s.file("ca.json"), config, 0o600); err != nil {
		s.tb.Fatal(err)
	}
}

func stepAuthority(name string, serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{Organization: []string{"Step"}, CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(240 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

func (s *StepCA) key(name string) *ecdsa.PrivateKey {
	s.tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		s.tb.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(err, os.WriteFile(s.file(name), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)); err != nil {
		s.tb.Fatal(err)
	}
	return key
}

func (s *StepCA) certificate(name string, template, parent *x509.Certificate, key, signer *ecdsa.PrivateKey) *x509.Certificate {
	s.tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		s.tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := errors.Join(err, os.WriteFile(s.file(name), text, 0o600)); err != nil {
		s.tb.Fatal(err)
	}
	return cert
}

// Log is what it wrote so far.
func (s *StepCA) Log() string { return strings.TrimSpace(s.log.String()) }

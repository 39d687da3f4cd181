// Three validators judge every case: ours, go-spiffe alone and openssl. Where one
// disagrees with the standards it is named in known_test.go, with the reason. For
// go-spiffe, whose version go.mod fixes, the test fails on the day when that changes.

package pathcase_test

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/integration/conform/pathcase"
	"merlon.dev/sdk/svid"
)

// cases are made once: keys take time under the race detector.
var cases = sync.OnceValue(func() []pathcase.Case { return pathcase.All(fatal{}) })

// fatal is a test for the forge, which makes cases for all tests.
type fatal struct{}

func (fatal) Helper()           {}
func (fatal) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

func bundle(c pathcase.Case) *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(c.TrustDomain, c.Trusted)
}

// differing holds a validator against the cases that count for it. changed is told of
// a known difference that is none any more.
func differing(t *testing.T, judge func(pathcase.Case) error, known map[string]string, counts func(pathcase.Case) bool, changed func(...any)) {
	t.Helper()
	left := make(map[string]bool)
	for id := range known {
		left[id] = true
	}
	agreed := 0
	for _, c := range cases() {
		err := judge(c)
		differs := (err == nil) != c.Accept
		_, expected := known[c.ID]
		delete(left, c.ID)
		switch {
		case differs && !expected && counts(c):
			t.Errorf("%s: accepted = %t, want %t: %s [%s]: %v", c.ID, err == nil, c.Accept, c.Why, c.By, err)
		case !differs && expected:
			changed(fmt.Sprintf("%s: accepted = %t as it should be, unlike before (%v)", c.ID, err == nil, err))
		case !differs:
			agreed++
		}
	}
	for id := range left {
		t.Errorf("%s: there is no such case", id)
	}
	t.Logf("%d of %d verdicts as the standards and prudence have them, %d differences known", agreed, len(cases()), len(known))
}

func always(pathcase.Case) bool { return true }

// Our verifier gives every verdict.
func TestOurVerdicts(t *testing.T) {
	for name, judge := range map[string]func(pathcase.Case) error{
		"VerifyRawChain": func(c pathcase.Case) error {
			_, err := svid.VerifyRawChain(c.Presented, bundle(c), c.Time)
			return err
		},
		"Trust": func(c pathcase.Case) error {
			chain := make([]*x509.Certificate, len(c.Presented))
			for i, der := range c.Presented {
				var err error
				if chain[i], err = x509.ParseCertificate(der); err != nil {
					return err
				}
			}
			trust := svid.NewTrust(x509bundle.NewSet(bundle(c)))
			_, err := trust.VerifyChain(chain, c.Time)
			_, again := trust.VerifyChain(chain, c.Time) // as one that it knows
			if (err == nil) != (again == nil) {
				return fmt.Errorf("first %w, then %w", err, again)
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { differing(t, judge, nil, always, t.Error) })
	}
}

// What go-spiffe v2.9.0 alone says.
func TestGoSPIFFEVerdicts(t *testing.T) {
	differing(t, func(c pathcase.Case) error {
		_, _, err := x509svid.ParseAndVerify(c.Presented, bundle(c), x509svid.WithTime(c.Time))
		return err
	}, goSPIFFEDiffers, always, t.Error)
}

// What openssl says, which knows nothing of SPIFFE: only verdicts of RFC 5280 count.
func TestOpenSSLVerdicts(t *testing.T) {
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed: apt-get install openssl")
	}
	dir := t.TempDir()
	differing(t, func(c pathcase.Case) error { return openssl(t, path, dir, c) }, opensslDiffers,
		func(c pathcase.Case) bool { return c.Accept || c.By == pathcase.RFC5280 }, t.Log) // of any version
}

// openssl judges a case by `openssl verify` in its strict mode, as a server's and as
// a client's.
func openssl(t *testing.T, path, dir string, c pathcase.Case) error {
	t.Helper()
	if len(c.Presented) == 0 || len(c.Trusted) == 0 {
		return errors.New("openssl verify cannot be asked")
	}
	write := func(name string, ders ...[]byte) string {
		var text []byte
		for _, der := range ders {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
		}
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	var trusted [][]byte
	for _, cert := range c.Trusted {
		trusted = append(trusted, cert.Raw)
	}
	args := []string{
		"verify", "-x509_strict", "-partial_chain", "-no-CApath", "-no-CAstore", "-policy_check",
		"-attime", strconv.FormatInt(c.Time.Unix(), 10), "-CAfile", write("trusted.pem", trusted...),
	}
	if len(c.Presented) > 1 {
		args = append(args, "-untrusted", write("untrusted.pem", c.Presented[1:]...))
	}
	leaf := write("leaf.pem", c.Presented[0])
	for _, purpose := range []string{"sslserver", "sslclient"} {
		said, err := exec.CommandContext(t.Context(), path, append(args, "-purpose", purpose, leaf)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, said)
		}
	}
	return nil
}

// The corpus is as large as it says, and each case says why.
func TestCorpus(t *testing.T) {
	seen, accepted, themes := make(map[string]bool), 0, make(map[string]int)
	for _, c := range cases() {
		if seen[c.ID] {
			t.Errorf("%s is there twice", c.ID)
		}
		seen[c.ID] = true
		themes[c.Theme()]++
		if c.Why == "" || c.By == "" || c.Requirement() == "" || strings.ToLower(c.ID) != c.ID || strings.Contains(c.ID, " ") {
			t.Errorf("%s: malformed", c.ID)
		}
		if c.Accept {
			accepted++
		}
	}
	for id := range pathcase.Requirements() {
		if strings.Contains(id, "/") && !seen[id] {
			t.Errorf("%s: a requirement of no case", id)
		}
	}
	if len(cases()) < 150 || accepted < 40 {
		t.Errorf("%d cases, %d of them accepted", len(cases()), accepted)
	}
	t.Logf("%d cases, %d of them accepted; by theme %v", len(cases()), accepted, themes)
}

// Whoever presents a path holds the private key of its first certificate: otherwise
// every server refuses, for a reason that the case is not about.
func TestKeyIsThePresentedOnes(t *testing.T) {
	held := 0
	for _, c := range cases() {
		if len(c.Presented) == 0 {
			continue
		}
		cert, err := x509.ParseCertificate(c.Presented[0])
		if err != nil {
			continue
		}
		public, ok := c.Key.Public().(interface{ Equal(crypto.PublicKey) bool })
		if !ok || !public.Equal(cert.PublicKey) {
			t.Errorf("%s: the key is not the first certificate's", c.ID)
			continue
		}
		held++
	}
	if held < 250 {
		t.Errorf("%d cases with their key", held)
	}
}

// In x509-limbo's format the corpus says the same.
func TestWriteLimbo(t *testing.T) {
	var buf bytes.Buffer
	if err := pathcase.WriteLimbo(&buf, cases()); err != nil {
		t.Fatal(err)
	}
	var read struct {
		Version   int
		TestCases []struct {
			ID                     string
			TrustDomain            string   `json:"trust_domain"`
			TrustedCerts           []string `json:"trusted_certs"`
			UntrustedIntermediates []string `json:"untrusted_intermediates"`
			PeerCertificate        string   `json:"peer_certificate"`
			ExpectedResult         string   `json:"expected_result"`
		}
	}
	if err := json.Unmarshal(buf.Bytes(), &read); err != nil {
		t.Fatal(err)
	}
	if read.Version != 1 || len(read.TestCases) != len(cases()) {
		t.Fatalf("version %d, %d cases", read.Version, len(read.TestCases))
	}
	for i, c := range cases() {
		lc := read.TestCases[i]
		if lc.ID != "spiffe::"+strings.Replace(c.ID, "/", "::", 1) || (lc.ExpectedResult == "SUCCESS") != c.Accept ||
			lc.TrustDomain != c.TrustDomain.Name() || len(lc.TrustedCerts) != len(c.Trusted) || len(lc.UntrustedIntermediates) != max(len(c.Presented)-1, 0) {
			t.Errorf("%s became %+v", c.ID, lc)
		}
		if len(c.Presented) > 0 {
			if block, _ := pem.Decode([]byte(lc.PeerCertificate)); block == nil || !bytes.Equal(block.Bytes, c.Presented[0]) {
				t.Errorf("%s: the peer's certificate is another one", c.ID)
			}
		}
	}
}

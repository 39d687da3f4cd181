// Command zlint lints certificates for tests: every lint that zlint has, one JSON
// line for each that finds something. It is a Go module of its own, so that the
// requirements of zlint are nobody else's.
package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"os"

	"github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"
)

// Finding is what one lint says about one certificate.
type Finding struct {
	Certificate int    `json:"certificate"` // counted from 0
	Lint        string `json:"lint"`
	Source      string `json:"source"`
	Status      string `json:"status"` // notice, warn, error, fatal
	Details     string `json:"details,omitempty"`
}

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "zlint: error:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer) error {
	text, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read certificates: %w", err)
	}
	enc := json.NewEncoder(out)
	n := 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("parse certificate %d: %w", n, err)
		}
		for name, r := range zlint.LintCertificate(cert).Results {
			if r.Status <= lint.Pass { // also: does not apply
				continue
			}
			source := lint.GlobalRegistry().CertificateLints().ByName(name).Source
			if err := enc.Encode(Finding{n, name, string(source), r.Status.String(), r.Details}); err != nil {
				return err
			}
		}
		n++
	}
	if n == 0 {
		return fmt.Errorf("no certificate among %d bytes", len(text))
	}
	return nil
}

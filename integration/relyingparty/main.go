// Command relyingparty takes an ID token as any party does that is built on a stock
// OpenID Connect library (go-oidc), in a Go module of its own: it finds the keys by
// discovery, and prints the subject.
//
//	relyingparty ISSUER CA_FILE AUDIENCE < TOKEN
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "relyingparty:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: relyingparty ISSUER CA_FILE AUDIENCE < TOKEN")
	}
	issuer, caFile, audience := args[0], args[1], args[2]
	authorities, err := os.ReadFile(caFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authorities) {
		return fmt.Errorf("%s has no certificate", caFile)
	}
	token, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	client := &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}},
	}
	ctx := oidc.ClientContext(context.Background(), client)
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		return err
	}
	// Which algorithms are accepted follows from the discovery document.
	id, err := provider.VerifierContext(ctx, &oidc.Config{ClientID: audience}).Verify(ctx, strings.TrimSpace(string(token)))
	if err != nil {
		return err
	}
	_, err = fmt.Println(id.Subject)
	return err
}

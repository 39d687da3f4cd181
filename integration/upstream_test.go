// A CA below a real step-ca: its SVIDs chain to step-ca's root, and it goes on while
// step-ca is away.

package integration_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
)

func TestCABelowStepCA(t *testing.T) {
	t.Parallel()
	step := stage.StartStepCA(t)
	binary := stage.Build(t, "merlon-ca-step", "ca/cmd/merlon-ca-full", "stepcas")
	d := stage.SeparateAs(t, binary, nil, step.Settings(stage.StepIntermediates)...)
	d.Entry("/me", "--ttl", "1h")
	var mine *x509svid.SVID
	stage.Eventually(t, "an SVID is served", func() (err error) { mine, err = fetch(t, d); return err })

	bundles, err := workloadapi.FetchX509Bundles(t.Context(), workloadapi.WithAddr(d.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	if roots := bundles.Bundles()[0].X509Authorities(); len(roots) != 1 || !roots[0].Equal(step.Root) {
		t.Errorf("%d roots in the trust bundle; want step-ca's alone", len(roots))
	}
	if _, err := svid.VerifyChain(mine.Certificates, bundles, time.Now()); err != nil || len(mine.Certificates) != 3 {
		t.Errorf("chain of %d: %v; want leaf, intermediate and step-ca's own", len(mine.Certificates), err)
	}
	intermediate := mine.Certificates[1]
	if intermediate.Issuer.CommonName != "Step Intermediate" || intermediate.URIs[0].String() != "spiffe://shop.test" ||
		intermediate.MaxPathLen != 0 || fmt.Sprint(intermediate.PermittedURIDomains) != "[shop.test]" || intermediate.Subject.SerialNumber == "" {
		t.Errorf("intermediate of %s by %s: names %v, path length %d, constraint %v", intermediate.Subject, intermediate.Issuer,
			intermediate.URIs, intermediate.MaxPathLen, intermediate.PermittedURIDomains)
	}
	shakeHands(t, mine, step.Root)
	// The log's checkpoint is verified under step-ca's root, too.
	file := filepath.Join(t.TempDir(), "svid.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: mine.Certificates[0].Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := d.Merlon("log", "audit", file); !strings.Contains(got, "logged") {
		t.Errorf("merlon log audit: %s", got)
	}

	// Without step-ca everything goes on, also over a restart.
	step.Kill()
	d.CA.Restart()
	stage.Eventually(t, "the CA is back without step-ca", func() error { _, _, err := d.Try("agent", "list"); return err })
	wantExpiry(t, d, "intermediate", intermediate.NotAfter)
	wantExpiry(t, d, "root", step.Root.NotAfter)
	d.Entry("/while-away")
	stage.Eventually(t, "an SVID is issued without step-ca", func() error {
		svids, err := workloadapi.FetchX509SVIDs(t.Context(), workloadapi.WithAddr(d.WorkloadAPI))
		if err != nil {
			return err
		}
		for _, got := range svids {
			if got.ID.Path() == "/while-away" {
				return nil
			}
		}
		return errors.New("not yet")
	})
}

// wantExpiry: the CA's metrics say when an authority ends.
func wantExpiry(t *testing.T, d *stage.Domain, authority string, end time.Time) {
	t.Helper()
	if got, err := expiry(d, authority); err != nil || !got.Equal(end) {
		t.Errorf("%s ends at %s, %v; want %s", authority, got, err, end)
	}
}

func expiry(d *stage.Domain, authority string) (time.Time, error) {
	text, _, err := healthPage(d, "/metrics")
	if err != nil {
		return time.Time{}, err
	}
	_, value, ok := strings.Cut(text, `merlon_ca_expiry_timestamp_seconds{authority="`+authority+`"} `)
	value, _, _ = strings.Cut(value, "\n")
	seconds, err := strconv.ParseFloat(value, 64)
	if !ok || err != nil {
		return time.Time{}, fmt.Errorf("no expiry of %s among the metrics: %w", authority, err)
	}
	return time.Unix(int64(seconds), 0), nil
}

func healthPage(d *stage.Domain, path string) (text string, status int, err error) {
	client := &http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get("http://" + d.Health + path)
	if err != nil {
		return "", 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), resp.StatusCode, err
}

// Renewal goes to step-ca; while that is away the CA says so, before its
// intermediate ends, and it recovers by itself.
func TestRenewalByStepCA(t *testing.T) {
	t.Parallel()
	step := stage.StartStepCA(t)
	binary := stage.Build(t, "merlon-ca-step", "ca/cmd/merlon-ca-full", "stepcas")
	// Half of its life, with 60 s before it begins, is over at once: each look renews.
	d := stage.CAAlone(t, binary, nil, append(step.Settings(stage.StepIntermediates), "intermediate_ttl: 20s", "x509_svid_ttl: 10s")...)
	renewed := func(what string) {
		t.Helper()
		before, err := expiry(d, "intermediate")
		if err != nil {
			t.Fatal(err)
		}
		stage.Eventually(t, what, func() error {
			if now, err := expiry(d, "intermediate"); err != nil || !now.After(before) {
				return fmt.Errorf("still ends at %s, %v", now, err)
			}
			return nil
		})
	}
	ready := func(want int, words string) func() error {
		return func() error {
			text, status, err := healthPage(d, "/ready")
			if err != nil || status != want || !strings.Contains(text, words) {
				return fmt.Errorf("/ready = %d, %v: %s", status, err, text)
			}
			return nil
		}
	}
	renewed("the intermediate is renewed")
	stage.Eventually(t, "the CA is ready", ready(http.StatusOK, ""))
	step.Kill()
	stage.Eventually(t, "the CA says that its intermediate ends", ready(http.StatusServiceUnavailable, "could not be renewed"))
	if log := d.CA.Log(); !strings.Contains(log, "upstream authority stepcas") {
		t.Errorf("the log does not say why:\n%s", log)
	}
	step.Start()
	renewed("the intermediate is renewed when step-ca is back")
	stage.Eventually(t, "the CA is ready again", ready(http.StatusOK, ""))
}

// shakeHands: mutual TLS by nothing but crypto/tls and step-ca's root.
func shakeHands(t *testing.T, mine *x509svid.SVID, root *x509.Certificate) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(root)
	var chain [][]byte
	for _, c := range mine.Certificates {
		chain = append(chain, c.Raw)
	}
	own := []tls.Certificate{{Certificate: chain, PrivateKey: mine.PrivateKey}}
	server := &tls.Config{Certificates: own, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}
	client := &tls.Config{
		Certificates: own, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, // no host name in it; all else is verified below
		VerifyConnection: func(cs tls.ConnectionState) error {
			between := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				between.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}
	left, right := net.Pipe()
	defer left.Close()
	defer right.Close()
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(left, server)
		_, err := io.WriteString(conn, "hello")
		done <- errors.Join(err, conn.Close())
	}()
	conn := tls.Client(right, client)
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "hello" {
		t.Errorf("the client reads %q, %v", got, err)
	}
	conn.Close()
	if err := <-done; err != nil {
		t.Errorf("the server: %v", err)
	}
}

func TestStepCAThatSignsLeavesIsRefused(t *testing.T) {
	t.Parallel()
	step := stage.StartStepCA(t)
	binary := stage.Build(t, "merlon-ca-step", "ca/cmd/merlon-ca-full", "stepcas")
	start := func(settings ...string) string {
		t.Helper()
		dir := stage.Dir(t)
		config := filepath.Join(dir, "ca.yaml")
		text := append([]string{
			"trust_domain: shop.test", "data_dir: " + filepath.Join(dir, "data"), "admin_socket: " + filepath.Join(dir, "s", "a.sock"),
			"address: 127.0.0.1:0", "https_address: 127.0.0.1:0", "health_address: 127.0.0.1:0",
		}, settings...)
		if err := os.WriteFile(config, []byte(strings.Join(text, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, stderr, err := stage.Run(t.Context(), t, nil, binary, "-config", config)
		if err == nil {
			t.Fatal("the CA started")
		}
		return stderr
	}
	leaves := start(step.Settings(stage.StepLeaves)...)
	step.Kill()
	away := start(step.Settings(stage.StepIntermediates)...)
	for name, tt := range map[string]struct{ stderr, words, hint string }{
		"leaves": {leaves, "it is a leaf, no signing certificate (X8): the upstream's template or role must set CA:TRUE", "hint: change the template"},
		"away":   {away, "the upstream authority gives no intermediate", "hint: see that the upstream authority runs"},
	} {
		if !strings.Contains(tt.stderr, tt.words) || !strings.Contains(tt.stderr, tt.hint) {
			t.Errorf("%s:\n%s", name, tt.stderr)
		}
	}
}

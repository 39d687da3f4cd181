// P1: what SVIDs cost through the whole path, against the bare cryptography in
// the same run.

package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/integration/measure"
)

const batchSize = 100

// BenchmarkSign: a gRPC batch of 100 with registry check, lint, audit, client
// and sync, against the check of as many CSRs and crypto/x509's certificates.
func BenchmarkSign(b *testing.B) {
	c := startCA(b, tempDir(b), unbounded)
	a := c.agent("n1")
	req := &capb.SignRequest{}
	for i := range batchSize {
		_, csr := newCSR(b)
		req.Items = append(req.Items, &capb.SignItem{EntryId: c.entry("n1", fmt.Sprintf("w%d", i)).GetEntryId(), Csr: csr})
	}
	raw := rawSigner(b)
	measure.Interleaved(b, 1, measure.Variant{Name: "raw", Ops: batchSize, Run: func() error {
		for _, item := range req.GetItems() {
			raw(item.GetCsr())
		}
		return nil
	}}, measure.Variant{Name: "ca", Ops: batchSize, Run: func() error {
		resp, err := a.node.Sign(b.Context(), req)
		for _, r := range resp.GetResults() {
			if r.GetCode() != 0 {
				return errors.New(r.GetMessage())
			}
		}
		return err
	}})
}

// rawSigner checks a CSR and signs a certificate of the same shape.
func rawSigner(b *testing.B) func(csr []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	issuer := &x509.Certificate{SubjectKeyId: []byte("12345678901234567890"), PublicKey: key.Public(), NotAfter: time.Now().Add(time.Hour)}
	id := &url.URL{Scheme: "spiffe", Host: "shop.test", Path: "/web"}
	return func(csr []byte) {
		req, err := x509.ParseCertificateRequest(csr)
		if err != nil {
			b.Fatal(err)
		}
		if err := req.CheckSignature(); err != nil {
			b.Fatal(err)
		}
		serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 159))
		if err != nil {
			b.Fatal(err)
		}
		template := &x509.Certificate{
			SerialNumber: serial, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{id}, SubjectKeyId: issuer.SubjectKeyId,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if _, err := x509.CreateCertificate(rand.Reader, template, issuer, req.PublicKey, key); err != nil {
			b.Fatal(err)
		}
	}
}

// unbounded is for one agent that asks for as much as the CA can sign.
func unbounded(cfg *ca.Config) { cfg.AgentIssueRate = 1_000_000 }

// BenchmarkSignJWT: JWT-SVIDs through the whole CA, client and audit included,
// against as many ES256 signatures: 64 calls at a time for one each, and calls for
// 100. The authority alone: internal/authority BenchmarkIssueJWT.
func BenchmarkSignJWT(b *testing.B) {
	for name, test := range map[string]struct{ calls, items int }{"single": {64, 1}, "batch": {1, 100}} {
		b.Run(name, func(b *testing.B) { benchmarkSignJWT(b, test.calls, test.items) })
	}
}

func benchmarkSignJWT(b *testing.B, calls, items int) {
	c := startCA(b, tempDir(b), unbounded)
	a := c.agent("n1")
	req := &capb.SignJWTRequest{}
	for i := range items {
		req.Items = append(req.Items, &capb.SignJWTItem{EntryId: c.entry("n1", fmt.Sprintf("w%d", i)).GetEntryId(), Audience: []string{"orders"}})
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	message := make([]byte, 300)
	measure.Interleaved(b, 1, measure.Variant{Name: "raw", Ops: calls * items, Run: func() error {
		for range calls * items {
			digest := sha256.Sum256(message)
			if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
				return err
			}
		}
		return nil
	}}, measure.Variant{Name: "ca", Ops: calls * items, Run: func() error {
		var all errgroup.Group
		for range calls {
			all.Go(func() error { return signJWTs(b, a, req) })
		}
		return all.Wait()
	}})
}

func signJWTs(b *testing.B, a *testClient, req *capb.SignJWTRequest) error {
	resp, err := a.node.SignJWT(b.Context(), req)
	for _, r := range resp.GetResults() {
		if r.GetCode() != 0 {
			return errors.New(r.GetMessage())
		}
	}
	return err
}

// BenchmarkCreateEntry: registrations by 64 callers of the admin socket, each in
// the store, in the audit log twice (that it begins, and its outcome) and in the
// picture before its answer.
func BenchmarkCreateEntry(b *testing.B) {
	c := startCA(b, tempDir(b), unbounded)
	const callers = 64
	runtime.GC()
	begin := measure.CPU()
	for b.Loop() {
		var all errgroup.Group
		for i := range callers {
			all.Go(func() error {
				_, err := c.admin.CreateEntry(b.Context(), &capb.CreateEntryRequest{Entry: newEntry("n1", fmt.Sprintf("w%d", i))})
				return err
			})
		}
		if err := all.Wait(); err != nil {
			b.Fatal(err)
		}
	}
	n := float64(b.N * callers)
	b.ReportMetric(float64(measure.CPU()-begin)/n, "cpu-ns")
	b.ReportMetric(n/b.Elapsed().Seconds(), "entries/s")
}

// P1: what an X509-SVID costs through the whole path, against the bare
// cryptography in the same run.

package ca_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"net/url"
	"syscall"
	"testing"
	"time"

	"merlon.dev/ca/capb"
)

const batchSize = 100

// cpuTime is what this process has used, in user and kernel mode.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkSign reports CPU per SVID, client included.
func BenchmarkSign(b *testing.B) {
	_, csr := newCSR(b)
	b.Run("raw", func(b *testing.B) { benchRaw(b, csr) })
	b.Run("grpc-batch-100", func(b *testing.B) { benchBatch(b, csr) })
}

// benchRaw checks a CSR and signs a certificate of the same shape.
func benchRaw(b *testing.B, csr []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	issuer := &x509.Certificate{SubjectKeyId: []byte("12345678901234567890"), PublicKey: key.Public(), NotAfter: time.Now().Add(time.Hour)}
	id := &url.URL{Scheme: "spiffe", Host: "shop.test", Path: "/web"}
	b.ReportAllocs()
	before := cpuTime(b)
	for b.Loop() {
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
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/svid")
}

func benchBatch(b *testing.B, csr []byte) {
	c := startCA(b, tempDir(b))
	a := c.agent("n1")
	req := &capb.SignRequest{}
	for i := range batchSize {
		e := c.entry("n1", fmt.Sprintf("w%d", i))
		req.Items = append(req.Items, &capb.SignItem{EntryId: e.GetEntryId(), Csr: csr})
	}
	b.ReportAllocs()
	before := cpuTime(b)
	for b.Loop() {
		resp, err := a.node.Sign(b.Context(), req)
		if err != nil {
			b.Fatal(err)
		}
		for _, r := range resp.GetResults() {
			if r.GetCode() != 0 {
				b.Fatal(r.GetMessage())
			}
		}
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N*batchSize), "cpu-ns/svid")
}

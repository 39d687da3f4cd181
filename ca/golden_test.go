// What leaves the CA as text: every profile as a client gets it over the wire.
// Rewrite with go test -update, and review the diff like code. Root,
// intermediates and policy certificates: internal/upstream/testdata.

package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"flag"
	"testing"

	"google.golang.org/grpc/codes"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

var update = flag.Bool("update", false, "rewrite golden files")

// profiles are one certificate of each kind that the CA hands out.
func profiles(t *testing.T) map[string]*x509.Certificate {
	t.Helper()
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	named := newEntry("n1", "db")
	named.CommonName, named.DnsNames, named.X509SvidTtlSeconds = "postgres", []string{"db.internal", "localhost"}, 600
	created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: named})
	if err != nil {
		t.Fatal(err)
	}
	plain := c.entry("n1", "web")
	_, leaf := a.svid(plain)
	_, namedLeaf := a.svid(created.GetEntry())
	sign := func(key crypto.Signer) []byte {
		resp, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{
			{EntryId: plain.GetEntryId(), Csr: csrOf(t, key, &x509.CertificateRequest{})},
		}})
		if err != nil {
			t.Fatal(err)
		}
		if r := resp.GetResults()[0]; r.GetCode() != 0 {
			t.Fatalf("Sign: %s %s", codes.Code(r.GetCode()), r.GetMessage())
		}
		return resp.GetResults()[0].GetX509Svid()[0]
	}
	certs := make(map[string]*x509.Certificate)
	for name, der := range map[string][]byte{
		"leaf": leaf[0], "leaf_named": namedLeaf[0], "agent": a.chain[0],
		"leaf_p384":    sign(p384),
		"leaf_rsa2048": sign(forge.NewRSAKey(t, 2048, 65537)),
		"leaf_rsa3072": sign(forge.NewRSAKey(t, 3072, 65537)),
	} {
		if certs[name], err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
	}
	certs["own"] = dialTLS(t, c.srv.Address().String()).PeerCertificates[0]
	return certs
}

func TestProfilesAreTheGoldenOnes(t *testing.T) {
	for name, cert := range profiles(t) {
		forge.Golden(t, *update, name, forge.Dump(cert))
	}
}

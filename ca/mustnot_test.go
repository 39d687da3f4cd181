// What the CA must not sign, asked for over its real API by those who may ask:
// an agent with a good certificate, an operator. Each is refused by name, and
// nothing is logged as issued.

package ca_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"math"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// abusive are CSRs that ask for more than a certificate for their key, or show a
// key that nobody should have; each with a word of the refusal.
func abusive(t *testing.T) map[string]struct {
	csr  []byte
	want string
} {
	t.Helper()
	key, good := newCSR(t)
	p521, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	flipped := append([]byte(nil), good...)
	flipped[len(flipped)-1] ^= 1
	shop := func(path string) *url.URL { return &url.URL{Scheme: "spiffe", Host: "shop.test", Path: path} }
	with := func(template x509.CertificateRequest) []byte { return csrOf(t, key, &template) }
	extension := func(oid []int, value ...byte) []byte {
		return with(x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: oid, Critical: true, Value: value}}})
	}
	return map[string]struct {
		csr  []byte
		want string
	}{
		"other URI":       {with(x509.CertificateRequest{URIs: []*url.URL{shop("/admin")}}), "/admin"},
		"two URIs":        {with(x509.CertificateRequest{URIs: []*url.URL{shop("/web"), shop("/admin")}}), "/admin"},
		"own URI twice":   {with(x509.CertificateRequest{URIs: []*url.URL{shop("/web"), shop("/web")}}), "2 URI SANs"},
		"DNS SAN":         {with(x509.CertificateRequest{DNSNames: []string{"orders.shop.test"}}), "orders.shop.test"},
		"isCA":            {extension([]int{2, 5, 29, 19}, 0x30, 3, 1, 1, 0xff), "2.5.29.19"},
		"keyUsage":        {extension([]int{2, 5, 29, 15}, 3, 2, 1, 6), "2.5.29.15"},
		"RSA 1024":        {csrOf(t, forge.NewRSAKey(t, 1024, 65537), &x509.CertificateRequest{}), "1024 bits"},
		"RSA 16384":       {csrOf(t, forge.NewRSAKey(t, 16384, 65537), &x509.CertificateRequest{}), "public key of 2086 bytes"},
		"RSA, exponent 3": {csrOf(t, forge.NewRSAKey(t, 2048, 3), &x509.CertificateRequest{}), "exponent 3"},
		"P-521":           {csrOf(t, p521, &x509.CertificateRequest{}), "P-521"},
		"Ed25519":         {csrOf(t, edKey, &x509.CertificateRequest{}), "ed25519"},
		"bad signature":   {flipped, "not signed by its own key"},
		"empty":           {nil, "does not parse"},
		"noise":           {[]byte("-----BEGIN"), "does not parse"},
		"1 MB":            {append(append([]byte(nil), good...), make([]byte, 1<<20)...), "at most 8192"},
	}
}

// SECURITY.md T11: for a workload, and for the agent itself.
func TestAbusiveCSRsAreRefusedAndNothingIsIssued(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	e := c.entry("n1", "web")
	before := c.issuances()
	for name, test := range abusive(t) {
		resp, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: e.GetEntryId(), Csr: test.csr}}})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r := resp.GetResults()[0]
		if codes.Code(r.GetCode()) != codes.InvalidArgument || len(r.GetX509Svid()) > 0 || !refusedCSR(r.GetMessage(), test.want) {
			t.Errorf("%s: code %s, message %q; want InvalidArgument for the csr with %q", name, codes.Code(r.GetCode()), r.GetMessage(), test.want)
		}
		_, err = a.node.Renew(t.Context(), &capb.RenewRequest{Csr: test.csr})
		if st := status.Convert(err); st.Code() != codes.InvalidArgument || !strings.HasPrefix(st.Message(), "csr: ") {
			t.Errorf("%s: Renew: %v; want InvalidArgument for the csr", name, err)
		}
	}
	if got := c.issuances(); len(got) != len(before) {
		t.Errorf("what was refused is recorded as issued: %v", got[len(before):])
	}
}

func refusedCSR(message, want string) bool {
	return strings.HasPrefix(message, "csr: ") && strings.Contains(message, want)
}

// Entries of another trust domain, and lives longer than any SVID's.
func TestEntriesThatMustNotBeSignedForAreRefused(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	e := c.entry("n1", "web")
	before := c.issuances()
	for name, change := range map[string]func(*capb.Entry){
		"another trust domain":    func(e *capb.Entry) { e.SpiffeId = "spiffe://other.test/web" },
		"below another's agent":   func(e *capb.Entry) { e.ParentId = "spiffe://other.test/agent/n1" },
		"the trust domain itself": func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test" },
		"an agent":                func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/agent/n1" },
		"the CA":                  func(e *capb.Entry) { e.SpiffeId = "spiffe://shop.test/ca" },
		"TTL above 24 h":          func(e *capb.Entry) { e.X509SvidTtlSeconds = 24*3600 + 1 },
		"TTL of all seconds":      func(e *capb.Entry) { e.X509SvidTtlSeconds = math.MaxInt64 },
		"TTL that wraps to 1 h":   func(e *capb.Entry) { e.X509SvidTtlSeconds = math.MaxInt64/int64(time.Second) + 3600 },
		"negative TTL":            func(e *capb.Entry) { e.X509SvidTtlSeconds = -1 },
		"JWT TTL above 1 h":       func(e *capb.Entry) { e.JwtSvidTtlSeconds = 3601 },
		"JWT TTL of all seconds":  func(e *capb.Entry) { e.JwtSvidTtlSeconds = math.MaxInt64 },
	} {
		bad := newEntry("n1", "web")
		change(bad)
		if _, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: bad}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v; want InvalidArgument", name, err)
		}
	}
	if got := c.issuances(); len(got) != len(before) {
		t.Errorf("what was refused is recorded as issued: %v", got[len(before):])
	}
	a.svid(e)
	if got := c.issuances(); len(got) != len(before)+1 {
		t.Errorf("after a good request %d more are recorded as issued; want 1", len(got)-len(before))
	}
}

// SECURITY.md T12: a key is one identity's, on one node.
func TestReusedKeysAreRefusedAndNothingIsIssued(t *testing.T) {
	c := startCA(t, tempDir(t))
	a, b := c.agent("n1"), c.agent("n2")
	web, orders, webOnB := c.entry("n1", "web"), c.entry("n1", "orders"), c.entry("n2", "web")
	key, _ := a.svid(web)
	csr, agentCSR := csrOf(t, key, &x509.CertificateRequest{}), csrOf(t, a.key, &x509.CertificateRequest{})
	sign := func(through *testClient, e *capb.Entry, csr []byte) *capb.SignResult {
		t.Helper()
		resp, err := through.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: e.GetEntryId(), Csr: csr}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetResults()[0]
	}
	before := c.issuances()
	for name, r := range map[string]*capb.SignResult{
		"another SPIFFE ID":            sign(a, orders, csr),
		"the same one on another node": sign(b, webOnB, csr),
		"the agent's key":              sign(a, orders, agentCSR),
		"the key of another's agent":   sign(b, webOnB, agentCSR),
	} {
		if codes.Code(r.GetCode()) != codes.InvalidArgument || len(r.GetX509Svid()) > 0 || !refusedCSR(r.GetMessage(), "another SPIFFE ID") {
			t.Errorf("%s: code %s, message %q; want a refusal of the csr", name, codes.Code(r.GetCode()), r.GetMessage())
		}
		if strings.Contains(r.GetMessage(), "shop.test") {
			t.Errorf("%s: it says whose the key is: %q", name, r.GetMessage())
		}
	}
	_, err := b.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr})
	wantCode(t, err, codes.InvalidArgument)
	token := &capb.AttestRequest_JoinToken{JoinToken: c.joinToken("n3")}
	_, err = c.client(nil, nil).node.Attest(t.Context(), &capb.AttestRequest{Evidence: token, Csr: csr})
	wantCode(t, err, codes.InvalidArgument)
	if got := c.issuances(); len(got) != len(before) {
		t.Errorf("what was refused is recorded as issued: %v", got[len(before):])
	}

	// Its owner may go on with it, the token is good, and of two in one batch one is.
	if r := sign(a, web, csr); r.GetCode() != 0 {
		t.Errorf("the owner of the key is refused: %s", r.GetMessage())
	}
	_, fresh := newCSR(t)
	if _, err := c.client(nil, nil).node.Attest(t.Context(), &capb.AttestRequest{Evidence: token, Csr: fresh}); err != nil {
		t.Errorf("the token was used up by a CSR that was refused: %v", err)
	}
	_, twice := newCSR(t)
	resp, err := a.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: web.GetEntryId(), Csr: twice}, {EntryId: orders.GetEntryId(), Csr: twice}}})
	if err != nil {
		t.Fatal(err)
	}
	if r := resp.GetResults(); r[0].GetCode() != 0 || codes.Code(r[1].GetCode()) != codes.InvalidArgument {
		t.Errorf("one key twice in a batch: %v, %v", r[0].GetMessage(), r[1].GetMessage())
	}
	// The records name the key as its certificates do.
	_, chain := a.svid(orders)
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	all := c.issuances()
	c.stop()
	again := startCA(t, c.dir) // it reads the log
	after := again.client(a.key, a.chain)
	if r := sign(after, orders, csr); codes.Code(r.GetCode()) != codes.InvalidArgument || !refusedCSR(r.GetMessage(), "another SPIFFE ID") {
		t.Errorf("after a restart: code %s, message %q; want a refusal of the csr", codes.Code(r.GetCode()), r.GetMessage())
	}
	if r := sign(after, web, csr); r.GetCode() != 0 {
		t.Errorf("after a restart the owner of the key is refused: %s", r.GetMessage())
	}
	if got, want := all[len(all)-1]["key_id"], hex.EncodeToString(leaf.SubjectKeyId); got != want {
		t.Errorf("the record names the key %v; want %s", got, want)
	}
}

// issuances are the audit records of signatures.
func (c *testCA) issuances() (issued []map[string]any) {
	c.t.Helper()
	for _, r := range c.auditRecords() {
		if r["type"] == "issue" || r["type"] == "renew" || r["type"] == "attest" || r["serial"] != nil {
			issued = append(issued, r)
		}
	}
	return issued
}

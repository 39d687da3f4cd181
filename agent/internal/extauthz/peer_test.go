// Who calls, by what an Envoy sends.

package extauthz

import (
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"strings"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"merlon.dev/sdk/svid/forge"
)

// encoded is a leaf as Envoy sends it.
func encoded(s *forge.SVID) string {
	return strings.ReplaceAll(url.QueryEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Chain[0].Raw}))), "+", "%20")
}

func TestPeer(t *testing.T) {
	inter := forge.New(t, "shop.test").Intermediate()
	const web = "spiffe://shop.test/web"
	sound := inter.Leaf("/web")
	for name, tt := range map[string]struct {
		principal, certificate string
		refused                string // empty: it is web
	}{
		"by its certificate":         {web, encoded(sound), ""},
		"without":                    {web, "", ""},
		"no principal":               {"", "", "no principal"},
		"a certificate alone":        {"", encoded(sound), "no principal"},
		"a DNS name":                 {"orders.shop.test", "", "not the SPIFFE ID"},
		"a subject":                  {"CN=web", "", "not the SPIFFE ID"},
		"a trust domain":             {"spiffe://shop.test", "", "not the SPIFFE ID"},
		"a malformed ID":             {"spiffe://shop.test/a/../web", "", "not the SPIFFE ID"},
		"another's certificate":      {web, encoded(inter.Leaf("/admin")), "the certificate is of spiffe://shop.test/admin"},
		"two SPIFFE IDs":             {web, encoded(inter.Leaf("/web", forge.URIs(web, "spiffe://shop.test/admin"))), "2 URI SANs"},
		"a CA":                       {web, encoded(inter.Leaf("/web", func(c *x509.Certificate) { c.IsCA = true })), "CA:TRUE"},
		"another extended key usage": {web, encoded(inter.Leaf("/web", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} })), "X12"},
		"no certificate":             {web, "x", "not one certificate"},
		"bad encoding":               {web, "%zz", "invalid URL escape"},
		"two certificates":           {web, encoded(sound) + encoded(sound), "not one certificate"},
		"another kind of PEM":        {web, strings.ReplaceAll(encoded(sound), "CERTIFICATE", "PRIVATE%20KEY"), "not one certificate"},
		"too much":                   {web, strings.Repeat("x", maxCertificateBytes+1), "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			var p peers
			for range 2 { // what was refused is not remembered, what was read is
				peer, err := p.of(&authv3.AttributeContext_Peer{Principal: tt.principal, Certificate: tt.certificate})
				switch {
				case tt.refused != "":
					if err == nil || !strings.Contains(err.Error(), tt.refused) {
						t.Errorf("%v; want a refusal with %q", err, tt.refused)
					}
				case err != nil || peer.ID.String() != web || (peer.Leaf == nil) != (tt.certificate == ""):
					t.Errorf("%+v, %v; want web", peer, err)
				case peer.Leaf != nil && (peer.SerialHex != sound.Chain[0].SerialNumber.Text(16) || len(peer.AuthorityIDs) != 1):
					t.Errorf("serial %s, authorities %q", peer.SerialHex, peer.AuthorityIDs)
				}
			}
			if remembered := len(p.young); remembered > 1 || tt.refused != "" && remembered != 0 && name != "another's certificate" {
				t.Errorf("%d certificates are remembered", remembered)
			}
		})
	}
}

// Memory does not grow with the certificates that there ever were.
func TestCertificatesAreForgotten(t *testing.T) {
	leaf := forge.New(t, "shop.test").Intermediate().Leaf("/web")
	var p peers
	peer, err := p.read(encoded(leaf))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 * maxPeers {
		p.remember([32]byte{byte(i), byte(i >> 8), 1}, peer)
	}
	if n := len(p.young) + len(p.older); n > 2*maxPeers {
		t.Errorf("%d certificates are remembered; want at most %d", n, 2*maxPeers)
	}
	if again, err := p.read(encoded(leaf)); err != nil || again == peer {
		t.Errorf("%v, %v; want the certificate read again", again, err)
	}
}

func BenchmarkPeer(b *testing.B) {
	leaf := encoded(forge.New(b, "shop.test").Intermediate().Leaf("/web"))
	source := &authv3.AttributeContext_Peer{Principal: "spiffe://shop.test/web", Certificate: leaf}
	var p peers
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.of(source); err != nil {
			b.Fatal(err)
		}
	}
}

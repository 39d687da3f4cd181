// What Envoy's SPIFFE validator does not check and our verifier does, so that
// the table in agent/README.md stays true: forged SVIDs whose signatures are
// good, shown to both.

package envoy_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
)

// echoConfig is an Envoy that lets in whom the SPIFFE validator lets in, and
// says back what it is told.
const echoConfig = `
static_resources:
  listeners:
  - address: {socket_address: {address: 127.0.0.1, port_value: %[1]s}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_certificates: [{certificate_chain: {inline_string: %[2]s}, private_key: {inline_string: %[3]s}}]
            validation_context:
              custom_validator_config:
                name: envoy.tls.cert_validator.spiffe
                typed_config:
                  "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig
                  trust_domains: [{name: shop.test, trust_bundle: {inline_string: %[4]s}}]
      filters:
      - name: envoy.filters.network.echo
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo}
`

// startEcho runs one that trusts root.
func startEcho(t *testing.T, root *forge.Authority) (address string) {
	t.Helper()
	port := stage.FreePort(t)
	chain, key, err := root.Intermediate().Leaf("/echo").X509SVID().Marshal()
	if err != nil {
		t.Fatal(err)
	}
	quote := func(text []byte) string {
		quoted, err := json.Marshal(string(text))
		if err != nil {
			t.Fatal(err)
		}
		return string(quoted)
	}
	config := filepath.Join(stage.Dir(t), "echo.yaml")
	text := fmt.Sprintf(echoConfig, fmt.Sprint(port), quote(chain), quote(key),
		quote(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Cert.Raw})))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	(&envoy{t: t}).run(config)
	return fmt.Sprintf("127.0.0.1:%d", port)
}

// echoed shows Envoy an SVID, and says what it has against it.
func echoed(address string, shown *forge.SVID) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", address,
		&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{shown.Certificate()}})
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	conn.Write([]byte{'x'}) // that it was refused, the read says better
	_, err = conn.Read(make([]byte, 1))
	return err
}

func TestWhatEnvoyDoesNotCheck(t *testing.T) {
	t.Parallel()
	root := forge.New(t, "shop.test")
	inter := root.Intermediate()
	address := startEcho(t, root)
	stage.Eventually(t, "a sound SVID is let in", func() error { return echoed(address, inter.Leaf("/web")) })

	usage := func(u x509.KeyUsage) forge.Change { return func(c *x509.Certificate) { c.KeyUsage = u } }
	for name, test := range map[string]struct {
		svid *forge.SVID
		rule string // of our verifier
		in   bool   // Envoy lets it in
	}{
		"a CA as a workload":       {inter.Leaf("/web", func(c *x509.Certificate) { c.IsCA = true }), "X14", false},
		"keyCertSign":              {inter.Leaf("/web", usage(x509.KeyUsageDigitalSignature|x509.KeyUsageCertSign)), "X14", false},
		"another trust domain":     {inter.Leaf("/web", forge.URIs("spiffe://stranger.test/web")), "X17", false},
		"no URI":                   {inter.Leaf("/web", forge.URIs()), "X14", false},
		"expired":                  {inter.Leaf("/web", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "X13", false},
		"no path":                  {inter.Leaf(""), "X4", false},
		"no keyUsage":              {inter.Leaf("/web", usage(0)), "X10", false},
		"a signer that may not":    {root.Intermediate(usage(x509.KeyUsageCRLSign)).Leaf("/web"), "X13", false},
		"only a slash for a path":  {inter.Leaf("/web", forge.URIs("spiffe://shop.test/")), "ID5", true},
		"a path that is malformed": {inter.Leaf("/web", forge.RawURIs(true, "spiffe://shop.test/a/../admin")), "ID5", true},
		"an empty segment":         {inter.Leaf("/web", forge.RawURIs(true, "spiffe://shop.test//web")), "ID5", true},
		"two SPIFFE IDs":           {inter.Leaf("/web", forge.URIs("spiffe://shop.test/web", "spiffe://shop.test/admin")), "X2", true},
		"a second URI":             {inter.Leaf("/web", forge.URIs("spiffe://shop.test/web", "https://shop.test/")), "X2", true},
		"no extended key usage for clients": {
			inter.Leaf("/web", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), "X12", true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := svid.VerifyRawChain(test.svid.Raw(), root.Bundle(), time.Now())
			if err == nil || !strings.Contains(err.Error(), test.rule) {
				t.Errorf("our verifier: %v; want a refusal by rule %s", err, test.rule)
			}
			if err := echoed(address, test.svid); (err == nil) != test.in {
				t.Errorf("Envoy: %v; want it to let it in: %t", err, test.in)
			}
		})
	}
}

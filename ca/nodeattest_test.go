// Node attestation by evidence other than tokens, over the real port: what is
// not configured is refused, nothing is good twice, and everything is recorded.

package ca_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/config"
	"merlon.dev/sdk/possession"
	"merlon.dev/sdk/settings"
)

// site certifies nodes.
type site struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // with the certificate
}

func newSite(t testing.TB) *site {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &site{key: key, file: filepath.Join(t.TempDir(), "site.pem")}
	s.cert = s.certify(t, key, &x509.Certificate{
		Subject: pkix.Name{CommonName: "site"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	if err := os.WriteFile(s.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.cert.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *site) certify(t testing.TB, key *ecdsa.PrivateKey, template *x509.Certificate) *x509.Certificate {
	t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent := s.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// node makes a certificate for the node called name, with its key.
func (s *site) node(t testing.TB, name string) (*ecdsa.PrivateKey, [][]byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key, [][]byte{s.certify(t, key, &x509.Certificate{Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature}).Raw}
}

// bound is a client on one connection, of which it knows the state.
func (c *testCA) bound() (capb.NodeClient, tls.ConnectionState) {
	c.t.Helper()
	cfg := clientTLS(nil, nil)
	cfg.NextProtos = []string{"h2"}
	conn, err := tls.Dial("tcp", c.srv.Address().String(), cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	cc, err := grpc.NewClient("passthrough:///ca", grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS is below
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return conn, nil }))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { cc.Close() })
	return capb.NewNodeClient(cc), conn.ConnectionState()
}

func popRequest(t testing.TB, conn tls.ConnectionState, key *ecdsa.PrivateKey, chain [][]byte, csr []byte) *capb.AttestRequest {
	t.Helper()
	statement, err := possession.Statement(conn, csr)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := possession.Sign(key, statement)
	if err != nil {
		t.Fatal(err)
	}
	return &capb.AttestRequest{Evidence: &capb.AttestRequest_X509Pop{X509Pop: &capb.X509Pop{Chain: chain, Signature: signature}}, Csr: csr}
}

func takesCertificates(s *site) func(*ca.Config) {
	return func(cfg *ca.Config) { cfg.NodeAttestors.X509POP = &ca.X509POP{CAFile: s.file, Name: "common_name"} }
}

func TestNodeProvesItselfByItsCertificateAndAgain(t *testing.T) {
	s := newSite(t)
	c := startCA(t, tempDir(t), takesCertificates(s))
	key, chain := s.node(t, "rack1-7")
	attest := func() *testClient {
		node, conn := c.bound()
		agentKey, csr := newCSR(t)
		resp, err := node.Attest(t.Context(), popRequest(t, conn, key, chain, csr))
		if err != nil {
			t.Fatal(err)
		}
		return c.client(agentKey, resp.GetX509Svid())
	}
	const id = "spiffe://shop.test/agent/x509pop/cn/rack1-7"
	first := attest()
	web := c.entry("x509pop/cn/rack1-7", "web")
	first.svid(web)
	until(t, first.sync(0), synced)
	attest().svid(web) // it lost its key

	resp, err := c.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
	if err != nil || len(resp.GetAgents()) != 1 {
		t.Fatalf("agents = %v, %v; want one", resp.GetAgents(), err)
	}
	a := resp.GetAgents()[0]
	if a.GetSpiffeId() != id || a.GetAttestation() != "x509pop" || len(a.GetSelectors()) != 3 || a.GetSelectors()[1].GetValue() != "subject-cn:rack1-7" {
		t.Errorf("the agent is listed as %v", a)
	}
	attested := 0
	for _, r := range c.auditRecords() {
		if r["type"] == "attest" && r["spiffe_id"] == id && r["detail"] == "x509pop" {
			attested++
		}
	}
	if attested != 2 {
		t.Errorf("%d attestations are recorded; want 2", attested)
	}
}

func TestEvidenceThatIsRefusedIsRecordedWithItsReason(t *testing.T) {
	s, stranger := newSite(t), newSite(t)
	c := startCA(t, tempDir(t), takesCertificates(s))
	key, chain := s.node(t, "rack1-7")
	_, otherConn := c.bound()
	foreignKey, foreign := stranger.node(t, "rack1-7")
	_, csr := newCSR(t)
	_, otherCSR := newCSR(t)
	for name, tc := range map[string]struct {
		make func(tls.ConnectionState) *capb.AttestRequest
		says string
	}{
		"replayed on another connection": {func(tls.ConnectionState) *capb.AttestRequest { return popRequest(t, otherConn, key, chain, csr) }, "this connection and CSR"},
		"with another's CSR": {func(conn tls.ConnectionState) *capb.AttestRequest {
			req := popRequest(t, conn, key, chain, csr)
			req.Csr = otherCSR
			return req
		}, "this connection and CSR"},
		"of a stranger": {func(conn tls.ConnectionState) *capb.AttestRequest {
			return popRequest(t, conn, foreignKey, foreign, csr)
		}, "does not end in a configured root"},
		"another's certificate": {func(conn tls.ConnectionState) *capb.AttestRequest {
			return popRequest(t, conn, foreignKey, chain, csr)
		}, "this connection and CSR"},
	} {
		node, conn := c.bound()
		_, err := node.Attest(t.Context(), tc.make(conn))
		wantCode(t, err, codes.PermissionDenied)
		if said := status.Convert(err).Message(); !strings.Contains(said, tc.says) {
			t.Errorf("%s: it says %q; want %q", name, said, tc.says)
		} else if !c.refusalRecorded(said) {
			t.Errorf("%s: there is no audit record", name)
		}
	}
	resp, err := c.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
	if err != nil || len(resp.GetAgents()) != 0 {
		t.Errorf("agents = %v, %v; want none", resp.GetAgents(), err)
	}
}

func (c *testCA) refusalRecorded(reason string) bool {
	c.t.Helper()
	for _, r := range c.auditRecords() {
		if r["type"] == "refuse" && r["reason"] == reason {
			return true
		}
	}
	return false
}

func TestKindsThatAreNotConfiguredAreRefused(t *testing.T) {
	s := newSite(t)
	c := startCA(t, tempDir(t))
	key, chain := s.node(t, "rack1-7")
	node, conn := c.bound()
	_, csr := newCSR(t)
	_, err := node.Attest(t.Context(), popRequest(t, conn, key, chain, csr))
	wantCode(t, err, codes.PermissionDenied)
	if said := status.Convert(err).Message(); !strings.Contains(said, "node_attestors.x509pop") {
		t.Errorf("it says %q; want the setting that is missing", said)
	}
	_, err = node.Attest(t.Context(), &capb.AttestRequest{Evidence: &capb.AttestRequest_K8S{K8S: &capb.K8SToken{Cluster: "prod", Token: "x"}}, Csr: csr})
	wantCode(t, err, codes.PermissionDenied)
	if said := status.Convert(err).Message(); !strings.Contains(said, "node_attestors.k8s") {
		t.Errorf("it says %q; want the setting that is missing", said)
	}
	for setting, req := range map[string]*capb.AttestRequest{
		"node_attestors.gcp":   {Evidence: &capb.AttestRequest_GcpToken{GcpToken: "x"}, Csr: csr},
		"node_attestors.azure": {Evidence: &capb.AttestRequest_AzureToken{AzureToken: "x"}, Csr: csr},
		"node_attestors.aws":   {Evidence: &capb.AttestRequest_AwsDocument{AwsDocument: &capb.AwsDocument{}}, Csr: csr},
	} {
		_, err := node.Attest(t.Context(), req)
		wantCode(t, err, codes.PermissionDenied)
		if said := status.Convert(err).Message(); !strings.Contains(said, setting) {
			t.Errorf("it says %q; want the setting that is missing", said)
		}
	}
	_, err = node.Attest(t.Context(), &capb.AttestRequest{Csr: csr})
	wantCode(t, err, codes.InvalidArgument)
}

func TestNodeAttestorSettings(t *testing.T) {
	for text, want := range map[string]string{
		"node_attestors:\n  x509pop: {}":                                                                                                                                             "node_attestors.x509pop.ca_file",
		"node_attestors:\n  x509pop: {ca_file: /x, name: uri}":                                                                                                                       "node_attestors.x509pop.name",
		"node_attestors:\n  x509pop: {ca_file: /x, nam: x}":                                                                                                                          "nam",
		"node_attestors:\n  k8s: [{}]":                                                                                                                                               "k8s[0].cluster",
		"node_attestors:\n  k8s: [{cluster: a/b}]":                                                                                                                                   "k8s[0].cluster",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, audience: m}]":                                                                                                     "k8s[0].service_accounts",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, audience: m, service_accounts: [x]}]":                                                                              "k8s[0].service_accounts",
		"node_attestors:\n  k8s: [{cluster: a, audience: m, service_accounts: ['n:s']}]":                                                                                             "k8s[0].issuer",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, service_accounts: ['n:s']}]":                                                                                       "k8s[0].audience",
		"node_attestors:\n  k8s: [{cluster: a, issuer: http://i, audience: m, service_accounts: ['n:s']}]":                                                                           "k8s[0].issuer",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, api_server: https://a, audience: m, service_accounts: ['n:s']}]":                                                   "k8s[0].api_server",
		"node_attestors:\n  k8s: [{cluster: a, api_server: http://a, token_file: /t, audience: m, service_accounts: ['n:s']}]":                                                       "k8s[0].api_server",
		"node_attestors:\n  k8s: [{cluster: a, api_server: https://a, audience: m, service_accounts: ['n:s']}]":                                                                      "k8s[0].token_file",
		"node_attestors:\n  k8s: [{cluster: a, api_server: https://a, token_file: /t, service_accounts: ['n:s']}]":                                                                   "k8s[0].audience",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, token_file: /t, audience: m, service_accounts: ['n:s']}]":                                                          "k8s[0].token_file",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, keys_url: https://k, keys_file: /k, audience: m, service_accounts: ['n:s']}]":                                      "k8s[0].keys_file",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, audience: m, service_accounts: ['n:s']}]":                                                                          "",
		"node_attestors:\n  k8s: [{cluster: a, api_server: https://a, token_file: /t, audience: m, service_accounts: ['n:s']}]":                                                      "",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, audience: m, service_accounts: ['n:s']}, {cluster: a, issuer: https://j, audience: m, service_accounts: ['n:s']}]": "k8s[1].cluster",
		"node_attestors:\n  gcp: {audience: a}":                                                                                                                                      "gcp.projects",
		"node_attestors:\n  gcp: {projects: [p]}":                                                                                                                                    "gcp.audience",
		"node_attestors:\n  gcp: {projects: [p], audience: a, keys_url: http://k}":                                                                                                   "gcp.keys_url",
		"node_attestors:\n  gcp: {projects: [p], audience: a}":                                                                                                                       "",
		"node_attestors:\n  azure: {audience: a, subscriptions: [s]}":                                                                                                                "azure.tenant",
		"node_attestors:\n  azure: {audience: a, tenant: t}":                                                                                                                         "azure.subscriptions",
		"node_attestors:\n  azure: {audience: a, tenant: t, subscriptions: ['']}":                                                                                                    "azure.subscriptions",
		"node_attestors:\n  azure: {audience: a, tenant: t, subscriptions: [s]}":                                                                                                     "",
		"node_attestors:\n  aws: {certificates: {eu-central-1: /x}}":                                                                                                                 "aws.accounts",
		"node_attestors:\n  aws: {accounts: ['12345678901'], certificates: {eu-central-1: /x}}":                                                                                      "aws.accounts",
		"node_attestors:\n  aws: {accounts: [123456789012], certificates: {eu-central-1: /x}}":                                                                                       "aws.accounts",
		"node_attestors:\n  aws: {accounts: ['123456789012']}":                                                                                                                       "aws.certificates",
		"node_attestors:\n  aws: {accounts: ['123456789012'], certificates: {Frankfurt: /x}}":                                                                                        "aws.certificates",
		"node_attestors:\n  aws: {accounts: ['123456789012'], certificates: {eu-central-1: ''}}":                                                                                     "aws.certificates",
		"node_attestors:\n  aws: {accounts: ['123456789012'], certificates: {eu-central-1: /x}, max_age: -1s}":                                                                       "aws.max_age",
		"node_attestors:\n  aws: {accounts: ['123456789012'], certificates: {eu-central-1: /x}, audience: a}":                                                                        "audience",
		"node_attestors:\n  aws: {accounts: ['012345678901'], certificates: {us-gov-west-1: /x}, max_age: 24h}":                                                                      "",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, audience: m, service_accounts: ['n:*']}]":                                                                          "k8s[0].service_accounts",
		"node_attestors:\n  k8s: [{cluster: a, issuer: https://i, audience: m, service_accounts: ['n:a:b']}]":                                                                        "k8s[0].service_accounts",
		"node_attestors:\n  azure: {audience: a, tenant: t/../u, subscriptions: [s]}":                                                                                                "azure.tenant",
		"node_attestors:\n  tpm: {}":                                "tpm",
		"node_attestors:\n  x509pop: {ca_file: /x}":                 "",
		"node_attestors:\n  x509pop: {ca_file: /x, name: dns_name}": "",
	} {
		cfg, err := settings.Parse[config.Config]("ca.yaml", []byte("trust_domain: shop.test\n"+text))
		if err == nil {
			err = cfg.Validate()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v; want an error about %q", text, err, want)
		}
	}
}

// Files of node attestors that are of no use keep the CA from starting.
func TestFilesOfNodeAttestorsAreReadAtTheStart(t *testing.T) {
	missing, site := filepath.Join(t.TempDir(), "none.pem"), newSite(t).file
	aws := func(file string) ca.NodeAttestors {
		return ca.NodeAttestors{AWS: &ca.AWS{Accounts: []string{"123456789012"}, Certificates: map[string]string{"eu-central-1": file}}}
	}
	for name, tc := range map[string]struct {
		attestors ca.NodeAttestors
		want      string
	}{
		"roots that are missing":        {ca.NodeAttestors{X509POP: &ca.X509POP{CAFile: missing}}, "node_attestors.x509pop.ca_file"},
		"a certificate that is missing": {aws(missing), "node_attestors.aws.certificates: eu-central-1"},
		"one of the wrong key":          {aws(site), "RSA-2048 signature"},
		"no certificate":                {aws(textFile(t, "-----BEGIN PKCS7-----\nAAAA\n-----END PKCS7-----\n")), "does not parse as a certificate"},
		"something else":                {aws(textFile(t, "x")), "holds no certificate"},
	} {
		dir := tempDir(t)
		cfg := ca.Config{TrustDomain: "shop.test", NodeAttestors: tc.attestors}
		cfg.DataDir, cfg.AdminSocket = filepath.Join(dir, "data"), filepath.Join(dir, "s", "a.sock")
		cfg.Address, cfg.HTTPSAddress, cfg.HealthAddress = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
		srv, err := ca.New(cfg)
		if err == nil {
			err = srv.Run(t.Context())
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: the CA starts: %v; want an error about %q", name, err, tc.want)
		}
	}
}

func textFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAliasIsPushedToTheNodesThatItStandsFor(t *testing.T) {
	s := newSite(t)
	c := startCA(t, tempDir(t), takesCertificates(s))
	join := func(name string) *testClient {
		key, chain := s.node(t, name)
		node, conn := c.bound()
		agentKey, csr := newCSR(t)
		resp, err := node.Attest(t.Context(), popRequest(t, conn, key, chain, csr))
		if err != nil {
			t.Fatal(err)
		}
		return c.client(agentKey, resp.GetX509Svid())
	}
	rack, other := join("rack1"), join("rack2")
	streams := map[*testClient]grpc.BidiStreamingClient[capb.SyncRequest, capb.SyncResponse]{rack: rack.sync(0), other: other.sync(0)}
	for _, stream := range streams {
		until(t, stream, synced)
	}
	web := c.entry("alias/racks", "web")
	alias, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: &capb.Entry{
		SpiffeId: "spiffe://shop.test/agent/alias/racks", ParentId: "spiffe://shop.test/ca",
		Selectors: []*capb.Selector{{Type: "x509pop", Value: "subject-cn:rack1"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	msg := until(t, streams[rack], func(m *capb.SyncResponse) bool { return len(m.GetEntries()) > 0 })
	if got := msg.GetEntries(); len(got) != 1 || got[0].GetEntryId() != web.GetEntryId() || msg.GetReset_() {
		t.Errorf("pushed: %v; want the entry below the alias, and no listing", msg)
	}
	rack.svid(web)
	_, csr := newCSR(t)
	resp, err := other.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: web.GetEntryId(), Csr: csr}, {EntryId: alias.GetEntry().GetEntryId(), Csr: csr}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range resp.GetResults() {
		if codes.Code(r.GetCode()) != codes.PermissionDenied {
			t.Errorf("a node that the alias does not stand for: code %s; want PermissionDenied", codes.Code(r.GetCode()))
		}
	}
	resp, err = rack.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: alias.GetEntry().GetEntryId(), Csr: csr}}})
	if err != nil || codes.Code(resp.GetResults()[0].GetCode()) != codes.PermissionDenied {
		t.Errorf("an SVID for the alias itself: %v, %v; want PermissionDenied", resp, err)
	}
	jwt, err := rack.node.SignJWT(t.Context(), &capb.SignJWTRequest{Items: []*capb.SignJWTItem{{EntryId: web.GetEntryId(), Audience: []string{"db"}}}})
	if err != nil || jwt.GetResults()[0].GetCode() != 0 {
		t.Errorf("a JWT-SVID below the alias: %v, %v", jwt, err)
	}

	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: alias.GetEntry().GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	msg = until(t, streams[rack], func(m *capb.SyncResponse) bool { return len(m.GetRemovedEntryIds()) > 0 })
	if got := msg.GetRemovedEntryIds(); len(got) != 1 || got[0] != web.GetEntryId() {
		t.Errorf("removed: %v; want the entry below the alias", got)
	}
	_, csr = newCSR(t)
	resp, err = rack.node.Sign(t.Context(), &capb.SignRequest{Items: []*capb.SignItem{{EntryId: web.GetEntryId(), Csr: csr}}})
	if err != nil || codes.Code(resp.GetResults()[0].GetCode()) != codes.PermissionDenied {
		t.Errorf("an SVID below an alias that is gone: %v, %v; want PermissionDenied", resp, err)
	}
}

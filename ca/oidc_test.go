// Administrators with OIDC tokens, over the CA's real ports.

package ca_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/integration/oidcprovider"
	"merlon.dev/sdk/unixsock"
)

// withOIDC configures p: the subject of a token is its role.
func withOIDC(t *testing.T, p *oidcprovider.Provider) func(*ca.Config) {
	file := filepath.Join(t.TempDir(), "provider.pem")
	if err := os.WriteFile(file, p.CertificatePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	sub := func(role string) map[string]string { return map[string]string{"sub": role} }
	return func(cfg *ca.Config) {
		cfg.OIDC = []ca.OIDC{{Issuer: p.URL, Audience: "merlon", CAFile: file, Roles: []ca.OIDCRole{
			{Claims: sub("viewer"), Role: "viewer"},
			{Claims: sub("registrar"), Role: "registrar", Prefix: "/ns/shop"},
			{Claims: sub("policy-publisher"), Role: "policy-publisher"},
			{Claims: sub("operator"), Role: "operator"},
		}}}
	}
}

func TestTokenActsInItsRole(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t), withOIDC(t, p))
	token := func(sub string) string { return p.Token(p.Claims("merlon", sub, time.Now())) }
	registrar := c.bearer(token("registrar"))
	if _, err := createWithRole(t, registrar.admin, "ns/shop/web", noRole, ""); err != nil {
		t.Fatal(err)
	}
	_, err := createWithRole(t, registrar.admin, "ns/bank/web", noRole, "")
	wantCode(t, err, codes.PermissionDenied)
	_, err = c.bearer(token("stranger")).admin.ListEntries(t.Context(), &capb.ListEntriesRequest{})
	wantCode(t, err, codes.PermissionDenied)
	records := c.outcomes()
	records = records[len(records)-3:]
	made, refused, stranger := records[0], records[1], records[2]
	if made["actor"] != p.URL+"#registrar" || made["role"] != "registrar of /ns/shop" || made["spiffe_id"] != "spiffe://shop.test/ns/shop/web" {
		t.Errorf("act = %v; want the registrar's", made)
	}
	if refused["type"] != "refuse" || refused["actor"] != p.URL+"#registrar" || refused["spiffe_id"] != "spiffe://shop.test/ns/bank/web" {
		t.Errorf("refusal = %v; want the registrar's", refused)
	}
	if stranger["type"] != "refuse" || stranger["actor"] != p.URL+"#stranger" || stranger["role"] != nil {
		t.Errorf("refusal = %v; want the stranger's", stranger)
	}
}

// A token is judged at each call, also on a connection that is open.
func TestTokenEndsOnItsOpenConnection(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t), withOIDC(t, p))
	claims := p.Claims("merlon", "viewer", time.Now())
	end := time.Now().Add(5 * time.Second)
	claims["exp"] = end.Add(-10 * time.Second).Unix() // the leeway is over at end
	viewer := c.bearer(p.Token(claims))
	list := func() error {
		_, err := viewer.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
		return err
	}
	if err := list(); err != nil {
		t.Skipf("the machine is too slow to call within the leeway: %v", err)
	}
	time.Sleep(time.Until(end))
	err := list()
	if status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its end: %v; want Unauthenticated, because it has expired", err)
	}
}

// One call shows one credential.
func TestTwoCredentialsAreNone(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t), withOIDC(t, p))
	token := bearer(p.Token(p.Claims("merlon", "operator", time.Now())))
	a := c.agent("n1")
	operator := c.admins(a, "ops", capb.Role_ROLE_OPERATOR, "")
	socket, err := grpc.NewClient("unix://"+c.srv.AdminSocket(), grpc.WithTransportCredentials(unixsock.ClientCredentials()),
		grpc.WithUnaryInterceptor(withHeaders("authorization", "Bearer "+string(token))))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	list := func(conn grpc.ClientConnInterface) error {
		_, err := capb.NewAdminClient(conn).ListAgents(t.Context(), &capb.ListAgentsRequest{})
		return err
	}
	for name, conn := range map[string]grpc.ClientConnInterface{
		"beside an SVID": c.clientWith(operator.key, operator.chain, grpc.WithPerRPCCredentials(token)).conn,
		"on the socket":  socket,
		"twice":          c.clientWith(nil, nil, grpc.WithUnaryInterceptor(withHeaders("authorization", "Bearer "+string(token), "authorization", "Bearer "+string(token)))).conn,
		"no bearer":      c.clientWith(nil, nil, grpc.WithUnaryInterceptor(withHeaders("authorization", "Basic YTpi"))).conn,
	} {
		if err := list(conn); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", name, err)
		}
	}
	if err := list(c.bearer(string(token)).conn); err != nil {
		t.Errorf("the token alone: %v", err)
	}
	// To a call that is for everyone it does not matter what it shows.
	_, err = c.bearer("x").node.Attest(t.Context(), &capb.AttestRequest{})
	wantCode(t, err, codes.InvalidArgument)
}

// Without a configured issuer no token is anything.
func TestTokensAreNothingWhereNoneIsConfigured(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t))
	_, err := c.bearer(p.Token(p.Claims("merlon", "operator", time.Now()))).admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
	wantCode(t, err, codes.Unauthenticated)
	if p.Asked(oidcprovider.KeysPath) != 0 {
		t.Error("the CA asked an issuer that nobody configured")
	}
}

// A provider that is away is no verdict on its tokens.
func TestTokenWithoutKeysIsToldToComeBack(t *testing.T) {
	p := oidcprovider.Start(t)
	p.Change(func(a *oidcprovider.Answers) {
		a.Instead[oidcprovider.KeysPath] = func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusBadGateway) }
	})
	c := startCA(t, tempDir(t), withOIDC(t, p))
	token := p.Token(p.Claims("merlon", "operator", time.Now()))
	_, err := c.bearer(token).admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
	wantCode(t, err, codes.Unavailable)
	header := http.Header{"Authorization": {"Bearer " + token}}
	if code, _, body := do(t, httpClient(t, nil, nil), "PUT", c.url("/v1/policy/bundles/main"), header, policyBundle(t)); code != 503 {
		t.Errorf("PUT: %d %s; want 503", code, body)
	}
}

func TestTokensOverREST(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t), withOIDC(t, p))
	main := c.url("/v1/policy/bundles/main")
	who := identities(t, c)
	for _, test := range []struct {
		sub, client, method string
		want                int
	}{
		{"policy-publisher", "anonymous", "PUT", 200},
		{"policy-publisher", "anonymous", "GET", 200},
		{"operator", "anonymous", "PUT", 200},
		{"viewer", "anonymous", "GET", 200},
		{"viewer", "anonymous", "PUT", 403},
		{"registrar", "anonymous", "GET", 403},
		{"registrar", "anonymous", "PUT", 403},
		{"stranger", "anonymous", "GET", 403},
		{"operator", "workload", "PUT", 401}, // two credentials
		{"operator", "admin", "PUT", 401},
	} {
		header := http.Header{"Authorization": {"Bearer " + p.Token(p.Claims("merlon", test.sub, time.Now()))}}
		code, _, body := do(t, who[test.client], test.method, main, header, policyBundle(t))
		if code != test.want {
			t.Errorf("%s by %s with the token of %s: %d %s; want %d", test.method, test.client, test.sub, code, body, test.want)
		}
	}
	good := "Bearer " + p.Token(p.Claims("merlon", "operator", time.Now()))
	wrong := p.Token(p.Claims("somebody else", "operator", time.Now()))
	for name, header := range map[string]http.Header{
		"another audience": {"Authorization": {"Bearer " + wrong}},
		"noise":            {"Authorization": {"Bearer a.b.c"}},
		"two headers":      {"Authorization": {good, good}},
	} {
		if code, answer, body := do(t, who["anonymous"], "PUT", main, header, policyBundle(t)); code != 401 || answer.Get("WWW-Authenticate") != "Bearer" {
			t.Errorf("%s: %d %s; want 401", name, code, body)
		}
	}
}

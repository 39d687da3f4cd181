// ext_authz over the public socket: whose Envoy asks, who calls it, and that each
// check is one decision. A real Envoy is in integration/envoy/authz_test.go.

package agent_test

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/fakeca"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid/forge"
)

// envoyAsks is what an Envoy asks about a GET of /orders by web; change it as needed.
func envoyAsks(changes ...func(*authv3.AttributeContext)) *authv3.CheckRequest {
	http := &authv3.AttributeContext_HttpRequest{Method: "GET", Path: "/orders", Host: "orders", Headers: map[string]string{":method": "GET", ":path": "/orders"}}
	a := &authv3.AttributeContext{
		ContextExtensions: map[string]string{"merlon.protocol": "http"},
		Source:            &authv3.AttributeContext_Peer{Principal: web},
		Destination:       &authv3.AttributeContext_Peer{Principal: "spiffe://" + td + "/orders"},
		Request:           &authv3.AttributeContext_Request{Http: http},
	}
	for _, change := range changes {
		change(a)
	}
	return &authv3.CheckRequest{Attributes: a}
}

// showing lets web show a certificate.
func showing(leaf *forge.SVID) func(*authv3.AttributeContext) {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Chain[0].Raw})
	return func(a *authv3.AttributeContext) { a.Source.Certificate = url.PathEscape(string(text)) }
}

func toward(id string) func(*authv3.AttributeContext) {
	return func(a *authv3.AttributeContext) { a.Destination.Principal = id }
}

// check calls like Envoy: without the Workload API's header.
func (n *node) check(t testing.TB, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	t.Helper()
	cc, _ := conn(t, n.socket)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return authv3.NewAuthorizationClient(cc).Check(ctx, req)
}

// reasonOf is that of an answer, and fails the test where it allows what it denies.
func reasonOf(t testing.TB, m *authv3.CheckResponse, err error) string {
	t.Helper()
	if err != nil {
		t.Fatalf("Check() = %v", err)
	}
	reason := m.GetDynamicMetadata().GetFields()["reason"].GetStringValue()
	if allowed := codes.Code(m.GetStatus().GetCode()) == codes.OK; allowed != (reason == "ALLOWED") || allowed != (m.GetOkResponse() != nil) {
		t.Fatalf("Check() = %v: allowed: %v", m, allowed)
	}
	return reason
}

// startOrders runs an agent whose every process is orders, with the policy grants.
func startOrders(t *testing.T) (*fakeca.CA, *node) {
	t.Helper()
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	key := newPolicyKey(t)
	ca.PublishPolicy(key.bundle(grants, 1), key.announcement(1))
	n.policyIs(t, 1)
	return ca, n
}

func TestCheck(t *testing.T) {
	ca, n := startOrders(t)
	inter := forge.New(t, td).Intermediate()
	sound, lost := inter.Leaf("/web"), inter.Leaf("/web")
	// Of no revision of the CA's store, so that any revocation of its authority concerns it.
	stolen := forge.New(t, td).Intermediate().Leaf("/web", func(c *x509.Certificate) { c.SerialNumber = big.NewInt(4711) })
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_AuthorityId{AuthorityId: hex.EncodeToString(stolen.Chain[0].AuthorityKeyId)}})
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_Serial{Serial: lost.Chain[0].SerialNumber.Text(16)}})
	eventually(t, "the revocation is there", func() bool {
		m, err := n.check(t, envoyAsks(showing(lost)))
		return err == nil && reasonOf(t, m, err) == "REVOKED"
	})
	for name, tt := range map[string]struct {
		req  *authv3.CheckRequest
		want string
	}{
		"by its SPIFFE ID":             {envoyAsks(), "ALLOWED"},
		"by its certificate":           {envoyAsks(showing(sound)), "ALLOWED"},
		"no destination by name":       {envoyAsks(toward("")), "ALLOWED"},
		"another's destination":        {envoyAsks(toward("spiffe://" + td + "/other")), "ERROR"},
		"a destination that is no ID":  {envoyAsks(toward("CN=orders")), "ERROR"},
		"nobody calls":                 {envoyAsks(func(a *authv3.AttributeContext) { a.Source.Principal = "" }), "NO_IDENTITY"},
		"a name without a certificate": {envoyAsks(func(a *authv3.AttributeContext) { a.Source = nil }), "NO_IDENTITY"},
		"a header says who calls": {envoyAsks(func(a *authv3.AttributeContext) {
			a.Source.Principal = ""
			a.Request.Http.Headers["x-forwarded-client-cert"] = "URI=" + web
			a.Request.Http.Headers["x-spiffe-id"] = web
		}), "NO_IDENTITY"},
		"somebody else's certificate": {envoyAsks(showing(inter.Leaf("/admin"))), "NO_IDENTITY"},
		"a revoked certificate":       {envoyAsks(showing(lost)), "REVOKED"},
		"one of a revoked authority":  {envoyAsks(showing(stolen)), "REVOKED"},
		"one that has ended": {envoyAsks(showing(inter.Leaf("/web", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(-time.Second)
		}))), "EXPIRED"},
		"one that has not begun": {envoyAsks(showing(inter.Leaf("/web", func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(time.Hour), time.Now().Add(2*time.Hour)
		}))), "EXPIRED"},
		"another method": {envoyAsks(func(a *authv3.AttributeContext) {
			a.Request.Http.Method, a.Request.Http.Headers[":method"] = "POST", "POST"
		}), "METHOD"},
		"an ambiguous path": {envoyAsks(func(a *authv3.AttributeContext) {
			a.Request.Http.Path, a.Request.Http.Headers[":path"] = "/orders/%2e%2e", "/orders/%2e%2e"
		}), "BAD_REQUEST"},
		"an unknown protocol": {envoyAsks(func(a *authv3.AttributeContext) { a.ContextExtensions = nil }), "ERROR"},
		"nothing":             {&authv3.CheckRequest{}, "ERROR"},
	} {
		t.Run(name, func(t *testing.T) {
			before := decided(t, n)
			m, err := n.check(t, tt.req)
			if got := reasonOf(t, m, err); got != tt.want {
				t.Errorf("%s; want %s", got, tt.want)
			}
			if after := decided(t, n); after != before+1 {
				t.Errorf("%d decisions were counted; want one", after-before)
			}
			debug, ctx := n.debug(t)
			id := m.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue()
			why, err := debug.ExplainDecision(ctx, &agentpb.ExplainDecisionRequest{DecisionId: id})
			if err != nil || why.GetDecision().GetReason() != tt.want || why.GetInput().GetDestination() != "spiffe://"+td+"/orders" {
				t.Errorf("explained as %v, %v", why, err)
			}
		})
	}
	ca.Revoke(&capb.Revocation{Subject: &capb.Revocation_SpiffeId{SpiffeId: web}})
	eventually(t, "web is revoked", func() bool {
		m, err := n.check(t, envoyAsks())
		return reasonOf(t, m, err) == "REVOKED"
	})
}

// decided is how many decisions the agent has counted.
func decided(t *testing.T, n *node) (sum int) {
	t.Helper()
	for line := range strings.Lines(n.health(t, "/metrics")) {
		if rest, ok := strings.CutPrefix(line, "merlon_agent_decisions_total{"); ok {
			_, value, _ := strings.Cut(strings.TrimSpace(rest), "} ")
			count, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			sum += count
		}
	}
	return sum
}

// A process with several identities is the one that its Envoy shows, of those alone.
func TestCheckOfSeveralIdentities(t *testing.T) {
	ca, n := startOrders(t)
	ca.PutEntry(ca.Entry("e2", "/shipping", uidSelector))
	eventually(t, "the second identity is there", func() bool {
		m, err := n.check(t, envoyAsks(toward("spiffe://"+td+"/shipping")))
		return reasonOf(t, m, err) == "NO_GRANT"
	})
	m, err := n.check(t, envoyAsks(toward("spiffe://"+td+"/orders")))
	if got := reasonOf(t, m, err); got != "ALLOWED" {
		t.Errorf("as orders: %s; want ALLOWED", got)
	}
	m, err = n.check(t, envoyAsks(toward("spiffe://"+td+"/else")))
	if got := reasonOf(t, m, err); got != "ERROR" {
		t.Errorf("as another: %s; want ERROR", got)
	}
}

// Who is nobody's Envoy gets an answer, which no configuration lets through, and
// leaves no record of a service.
func TestCheckWithoutAnEntry(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/orders", "unix:uid:4242"))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	before := decided(t, n)
	m, err := n.check(t, envoyAsks())
	if got := reasonOf(t, m, err); got != "AGENT_UNAVAILABLE" {
		t.Errorf("%s; want AGENT_UNAVAILABLE", got)
	}
	if after := decided(t, n); after != before {
		t.Errorf("%d decisions were counted; want none", after-before)
	}
}

func TestCheckIsBounded(t *testing.T) {
	_, n := startOrders(t)
	_, err := n.check(t, envoyAsks(func(a *authv3.AttributeContext) { a.Request.Http.Body = strings.Repeat("x", 1<<20) }))
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request of more than a mebibyte: %v; want ResourceExhausted", err)
	}
	cc, _ := conn(t, n.socket)
	ctx, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	if _, err := authv3.NewAuthorizationClient(cc).Check(ctx, envoyAsks()); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a check that nobody waits for: %v; want DeadlineExceeded", err)
	}
}

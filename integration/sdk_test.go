// Services built on the SDK against the real agent and CA: the test process is
// workload /me, and calls itself.

package integration_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/httpauth"
)

// me opens the SDK as /me.
func me(t *testing.T, d *stage.Domain) *sdk.Identity {
	t.Helper()
	d.Entry("/me")
	id := services.Open(t, d)
	return id
}

func client(t *testing.T, id *sdk.Identity) *http.Client {
	transport := httpauth.Transport(id, sdk.Service("me"))
	t.Cleanup(func() { (&http.Client{Transport: transport}).CloseIdleConnections() })
	return &http.Client{Transport: transport}
}

// grants pushes a policy that allows /me to GET the paths of itself.
func grants(t *testing.T, d *stage.Domain, rule string) {
	t.Helper()
	dir := t.TempDir()
	text := fmt.Sprintf("grants:\n  - id: me-to-me\n    from: [%[1]s]\n    to: [%[1]s]\n    %s\n", d.ID("/me"), rule)
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)
}

// rego pushes a policy of one rule.
func rego(t *testing.T, d *stage.Domain, rule string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "policy.rego"), []byte("package authz\n\n"+rule+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)
}

func TestNothingIsAllowedUntilAPolicySaysSo(t *testing.T) {
	d := stage.Dev(t)
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(services.OK))
	c := client(t, id)
	services.WantReason(t, "no policy", c, url+"/a", "NO_BUNDLE")
	grants(t, d, "http: {methods: [GET], paths: [/a]}")
	services.WantReason(t, "a grant", c, url+"/a", "200 OK")
	services.WantReason(t, "another path", c, url+"/b", "PATH")
	grants(t, d, "http: {methods: [POST], paths: [/a]}")
	services.WantReason(t, "the grant is gone", c, url+"/a", "METHOD")
}

// The policy is compiled into the service, so that it decides with the agent gone
// as before.
func TestDecisionsOutliveTheAgent(t *testing.T) {
	d := stage.Separate(t)
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(services.OK))
	c := client(t, id)
	grants(t, d, "http: {methods: [GET], paths: [/a]}")
	services.WantReason(t, "a grant", c, url+"/a", "200 OK")
	d.Agent.Kill()
	for range 20 {
		if got := services.Reason(c, url+"/a"); got != "200 OK" {
			t.Fatalf("no agent: %q", got)
		}
		if got := services.Reason(c, url+"/b"); got != "PATH" {
			t.Fatalf("no agent, another path: %q", got)
		}
	}
	d.Agent.Restart()
	grants(t, d, "http: {methods: [GET], paths: [/b]}")
	services.WantReason(t, "a policy made after the agent was gone", c, url+"/b", "200 OK")
	services.WantReason(t, "what it takes away", c, url+"/a", "PATH")
}

// What cannot be compiled is the agent's to decide.
func TestNoAgentNoDecisionOfOPA(t *testing.T) {
	d := stage.Separate(t)
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(services.OK))
	c := client(t, id)
	rego(t, d, "allow if time.now_ns() > 0")
	services.WantReason(t, "a rule", c, url+"/a", "200 OK")
	d.Agent.Kill()
	services.WantReason(t, "no agent", c, url+"/a", "AGENT_UNAVAILABLE")
	d.Agent.Restart()
	services.WantReason(t, "the agent is back", c, url+"/a", "200 OK")
	// With the CA away the agent goes on deciding by what it has.
	d.CA.Kill()
	services.WantReason(t, "no CA", c, url+"/a", "200 OK")
}

func TestDenialIsExplained(t *testing.T) {
	d := stage.Dev(t)
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(services.OK))
	grants(t, d, "http: {methods: [POST]}")
	c := client(t, id)
	services.WantReason(t, "the grant is active", c, url+"/a", "METHOD")
	_, err := c.Get(url + "/a")
	var denied *sdk.DeniedError
	if !errors.As(err, &denied) {
		t.Fatalf("error = %v; want a DeniedError", err)
	}
	if got := d.Explain("decision", denied.DecisionID); !strings.Contains(got, "grant me-to-me: method GET not in [POST]") {
		t.Errorf("the explanation misses the nearest grant:\n%s", got)
	}
	// By the generation that decided, also when there is another.
	grants(t, d, "http: {methods: [GET]}")
	services.WantReason(t, "the next policy", c, url+"/a", "200 OK")
	if got := d.Explain("decision", denied.DecisionID); !strings.Contains(got, "grant me-to-me: method GET not in [POST]") {
		t.Errorf("after another policy:\n%s", got)
	}
	if got := d.Explain("identity", "--pid", fmt.Sprint(os.Getpid())); !strings.Contains(got, "matches "+d.ID("/me")) {
		t.Errorf("the explanation misses the identity:\n%s", got)
	}
}

// Ambiguous paths end before the handler, whatever the policy says.
func TestAmbiguousPathsReachNoHandler(t *testing.T) {
	d := stage.Dev(t)
	id := me(t, d)
	reached := make(chan string, 100)
	url := services.Serve(t, id, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { reached <- r.RequestURI }))
	grants(t, d, "http: {}")
	c := client(t, id)
	services.WantReason(t, "everything is granted", c, url+"/a", "200 OK")
	<-reached
	for _, path := range []string{"//a", "/a//b", "/a/../b", "/./a", "/%2e%2e/a", "/a%2fb", "/a%5cb", "/a%00", "/a%252fb", "/%61", "/a;b=c", "/a%0d"} {
		req, err := http.NewRequest(http.MethodGet, url+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.URL.Opaque = path
		if strings.HasPrefix(path, "//") {
			req.URL.Opaque = "//" + req.URL.Host + path
		}
		resp, err := c.Do(req)
		if denied, ok := errors.AsType[*sdk.DeniedError](err); ok && denied.Reason == policy.BadRequest {
			continue
		}
		if err == nil {
			resp.Body.Close()
			t.Errorf("path %s was answered %s; want BAD_REQUEST", path, resp.Status)
			continue
		}
		t.Errorf("path %s: %v; want BAD_REQUEST", path, err)
	}
	select {
	case uri := <-reached:
		t.Errorf("%s reached the handler", uri)
	default:
	}
}

func TestRevocationCutsAnOpenStream(t *testing.T) {
	d := stage.Dev(t)
	id := me(t, d)
	url := services.Serve(t, id, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}))
	grants(t, d, "http: {}")
	c := client(t, id)
	var body io.ReadCloser
	stage.Eventually(t, "the stream opens", func() error {
		resp, err := c.Get(url + "/feed")
		if err == nil {
			body = resp.Body
		}
		return err
	})
	defer body.Close()
	d.Merlon("revoke", "--spiffe-id", d.ID("/me"))
	ended := make(chan error, 1)
	go func() { _, err := io.Copy(io.Discard, body); ended <- err }()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the stream ended as if it were complete")
		}
	case <-time.After(15 * time.Second):
		t.Fatal("the stream was not cut")
	}
	services.WantReason(t, "a new SVID", c, url+"/feed2", "200 OK")
}

func TestGRPCCallsAreDecided(t *testing.T) {
	d := stage.Dev(t)
	id := me(t, d)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpcauth.ServerOptions(id)...)
	healthpb.RegisterHealthServer(srv, health.NewServer())
	go srv.Serve(lis)
	t.Cleanup(srv.Stop)
	cc, err := grpc.NewClient(lis.Addr().String(), grpcauth.DialOptions(id, sdk.Service("me"))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	check := func(reason string) {
		t.Helper()
		stage.Eventually(t, reason, func() error {
			got := "OK"
			_, err := healthpb.NewHealthClient(cc).Check(t.Context(), &healthpb.HealthCheckRequest{})
			if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
				got = string(denied.Reason)
			} else if err != nil {
				got = err.Error()
			}
			if got != reason {
				return fmt.Errorf("Check is answered %q; want %q", got, reason)
			}
			return nil
		})
	}
	check("NO_BUNDLE")
	grants(t, d, "grpc: {services: [grpc.health.v1.Health], methods: [Check]}")
	check("OK")
	grants(t, d, "grpc: {services: [grpc.health.v1.Health], methods: [Watch]}")
	check("METHOD")
	grants(t, d, "http: {}") // an http grant matches no gRPC call
	check("NO_GRANT")
}

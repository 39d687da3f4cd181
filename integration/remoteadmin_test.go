// Administration over the network: by the SVID of an entry with a role, by an
// OIDC token, and by nobody else's.

package integration_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/oidcprovider"
	"merlon.dev/integration/stage"
)

func TestAdminSVIDAdministersOverTheNetwork(t *testing.T) {
	d := stage.Separate(t)
	remote := func(args ...string) (out string, code int) {
		stdout, stderr, err := stage.Run(t.Context(), t, []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}, "merlon", append([]string{"--ca", d.GRPC}, args...)...)
		if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // straight from Run
			code = exit.ExitCode()
		}
		return stdout + stderr, code
	}
	stage.Eventually(t, "a program without an entry is told so", func() error {
		return expect(remote("agent", "list"))(1, "hint: this program has no registration entry")
	})
	create := []string{"entry", "create", "--parent", d.AgentID(), "--selector", "unix:path:" + stage.Bin(t, "merlon")}
	d.Merlon(append(create, "--spiffe-id", d.ID("/nobody"))...)
	stage.Eventually(t, "a workload that is no admin is refused", func() error {
		return expect(remote("agent", "list"))(4, "which is for: viewer or registrar or operator")
	})
	d.Merlon("entry", "delete", entryOf(t, d, "/nobody"))
	d.Merlon(append(create, "--spiffe-id", d.ID("/operator"), "--role", "operator")...)
	stage.Eventually(t, "an admin is let in", func() error {
		return expect(remote("agent", "list"))(0, d.AgentID())
	})
	stage.Eventually(t, "an admin pushes a policy", func() error {
		return expect(remote("policy", "push", quickstartPolicy))(0, "generation")
	})
}

// A pipeline without an agent pushes policy with its OIDC token, and a team
// registers its own workloads with another.
func TestTokenAdministersOverTheNetwork(t *testing.T) {
	p := oidcprovider.Start(t)
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	d := stage.Separate(t, fmt.Sprintf(`oidc:
  - issuer: %s
    audience: merlon
    ca_file: %s
    roles:
      - claims: {sub: ci}
        role: policy-publisher
      - claims: {groups: shop}
        role: registrar
        prefix: /ns/shop
`, p.URL, file("provider.pem", string(p.CertificatePEM()))))
	var trust struct {
		RootHashes []string `json:"root_hashes"`
	}
	if err := json.Unmarshal([]byte(d.Merlon("trust", "show", "-o", "json")), &trust); err != nil {
		t.Fatal(err)
	}
	claims := func(sub string) map[string]any { return p.Claims("merlon", sub, time.Now()) }
	as := func(hash string, claims map[string]any) func(args ...string) (string, int) {
		token := file("token", p.Token(claims)+"\n")
		return func(args ...string) (string, int) {
			env := []string{"MERLON_TOKEN_FILE=" + token, "MERLON_ROOT_HASH=" + hash, "SPIFFE_ENDPOINT_SOCKET="}
			stdout, stderr, err := stage.Run(t.Context(), t, env, "merlon", append([]string{"--ca", d.GRPC}, args...)...)
			code := 0
			if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // straight from Run
				code = exit.ExitCode()
			}
			return stdout + stderr, code
		}
	}
	check := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	hash := trust.RootHashes[0]
	create := []string{"entry", "create", "--parent", d.AgentID(), "--selector", "unix:uid:4100", "--spiffe-id"}

	ci := as(hash, claims("ci"))
	check("push", expect(ci("policy", "push", quickstartPolicy))(0, "generation"))
	check("push without a look at the agents", expect(ci("policy", "push", quickstartPolicy))(0, "not waited for the agents"))
	check("a publisher registers", expect(ci(append(create, d.ID("/web"))...))(4, "which is for: registrar or operator; its role is policy-publisher"))

	team := claims("ann")
	team["groups"] = []string{"shop"}
	shop := as(hash, team)
	check("register its own", expect(shop(append(create, d.ID("/ns/shop/web"))...))(0, d.ID("/ns/shop/web")))
	check("register another's", expect(shop(append(create, d.ID("/ns/shop-evil"))...))(4, "registrar of /ns/shop"))
	d.Merlon(append(create, d.ID("/ns/bank/web"))...)
	if out, code := shop("entry", "list"); code != 0 || !strings.Contains(out, "/ns/shop/web") || strings.Contains(out, "/ns/bank") {
		t.Errorf("list: exit code %d\n%s", code, out)
	}
	if out, code := shop("entry", "delete", entryOf(t, d, "/ns/bank/web")); code != 1 || !strings.Contains(out, "not found") {
		t.Errorf("delete another's: exit code %d\n%s", code, out)
	}

	old := claims("ci")
	old["exp"] = time.Now().Add(-time.Minute).Unix()
	check("expired", expect(as(hash, old)("policy", "push", quickstartPolicy))(4, "it has expired"))
	other := claims("ci")
	other["aud"] = "somebody else"
	check("another audience", expect(as(hash, other)("policy", "push", quickstartPolicy))(4, "not meant for"))
	// The token stays at home when the CA is not the one that is pinned.
	check("another root", expect(as(strings.Repeat("0", 64), claims("ci"))("policy", "push", quickstartPolicy))(1, "not the configured root_hash"))
	check("the other of two roots", expect(as(strings.Repeat("0", 64)+","+hash, claims("ci"))("policy", "push", quickstartPolicy))(0, "generation"))
	check("a root and noise", expect(as(hash+",", claims("ci"))("policy", "push", quickstartPolicy))(2, "merlon trust show"))
	check("no root", expect(as("", claims("ci"))("policy", "push", quickstartPolicy))(2, "merlon trust show"))
	check("no token", expect(ci("--token-file", filepath.Join(dir, "none"), "agent", "list"))(2, "hint: name a file"))
	if out, stderr, err := d.Try("--token-file", "x", "agent", "list"); err == nil || !strings.Contains(stderr, "add --ca HOST:PORT") {
		t.Errorf("a token on the admin socket: %v\n%s%s", err, out, stderr)
	}
}

// Interoperability: a program that knows only go-spiffe, and openssl.

package integration_test

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
)

// buildStranger compiles the stranger and shows that it links nothing of ours.
func buildStranger(t *testing.T) string {
	t.Helper()
	deps, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "./stranger").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(deps)) {
		if dep = strings.TrimSpace(dep); strings.HasPrefix(dep, "merlon.dev/") && dep != "merlon.dev/integration/stranger" {
			t.Fatalf("the stranger links %s", dep)
		}
	}
	bin := filepath.Join(stage.Dir(t), "stranger")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./stranger").CombinedOutput(); err != nil {
		t.Fatalf("build the stranger: %v\n%s", err, out)
	}
	return bin
}

func strangerCommand(t *testing.T, d *stage.Domain, bin string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), bin, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
	return cmd
}

func TestStrangerUsesTheWorkloadAPI(t *testing.T) {
	bin := buildStranger(t)
	d := stage.Dev(t)
	d.Merlon("entry", "create", "--spiffe-id", "spiffe://dev.local/stranger", "--selector", "unix:path:"+bin)

	out, err := strangerCommand(t, d, bin, "show", "spiffe://dev.local/orders").Output()
	if err != nil {
		t.Fatalf("stranger show: %v\n%s", err, stage.Stderr(err))
	}
	var got struct {
		SPIFFEID     string `json:"spiffe_id"`
		Chain        string `json:"chain"`
		Bundle       string `json:"bundle"`
		JWTSVIDID    string `json:"jwt_svid_id"`
		ValidatedID  string `json:"validated_id"`
		X509Bundles  int    `json:"x509_bundles"`
		JWTKeysInSet int    `json:"jwt_keys_in_set"`
	}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	const want = "spiffe://dev.local/stranger"
	if got.SPIFFEID != want || got.JWTSVIDID != want || got.ValidatedID != want {
		t.Errorf("SPIFFE IDs = %s, %s, %s; want %s in X509-SVID, JWT-SVID and validation", got.SPIFFEID, got.JWTSVIDID, got.ValidatedID, want)
	}
	if got.X509Bundles != 1 || got.JWTKeysInSet != 1 {
		t.Errorf("bundles = %d X.509, %d JWT keys; want the own trust domain's", got.X509Bundles, got.JWTKeysInSet)
	}
	opensslVerify(t, got.Chain, got.Bundle)
}

// opensslVerify has openssl judge the chain by the letter of RFC 5280.
func opensslVerify(t *testing.T, chain, roots string) {
	t.Helper()
	dir := t.TempDir()
	leaf, intermediates, ok := strings.Cut(chain, "-----END CERTIFICATE-----\n")
	if !ok {
		t.Fatalf("no certificate in %q", chain)
	}
	for name, text := range map[string]string{"leaf.pem": leaf + "-----END CERTIFICATE-----\n", "chain.pem": intermediates, "roots.pem": roots} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "openssl", "verify", "-x509_strict", "-purpose", "sslserver",
		"-CAfile", "roots.pem", "-untrusted", "chain.pem", "leaf.pem")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "leaf.pem: OK") {
		t.Errorf("openssl verify -x509_strict: %v\n%s", err, out)
	}
}

func TestStrangersCallEachOther(t *testing.T) {
	bin := buildStranger(t)
	d := stage.Dev(t)
	d.Merlon("entry", "create", "--spiffe-id", "spiffe://dev.local/stranger", "--selector", "unix:path:"+bin)
	server := strangerCommand(t, d, bin, "serve")
	stdout, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { server.Process.Kill(); server.Wait() }()
	url, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	out, err := strangerCommand(t, d, bin, "call", strings.TrimSpace(url), "spiffe://dev.local/stranger").Output()
	if err != nil {
		t.Fatalf("stranger call: %v\n%s", err, stage.Stderr(err))
	}
	if want := "hello, spiffe://dev.local/stranger"; string(out) != want {
		t.Errorf("answer = %q; want %q", out, want)
	}
	out, err = strangerCommand(t, d, bin, "call", strings.TrimSpace(url), "spiffe://dev.local/other").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "unexpected ID") {
		t.Errorf("a server with another ID was accepted: %v\n%s", err, out)
	}
}

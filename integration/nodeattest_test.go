// Nodes that prove themselves by something else than a join token, and again by
// themselves when they have to: real binaries, evidence in files.

package integration_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"merlon.dev/integration/k8sapi"
	"merlon.dev/integration/oidcprovider"
	"merlon.dev/integration/stage"
)

// attestedAgent is an agent as `merlon agent list -o json` shows it.
type attestedAgent struct {
	SPIFFEID    string    `json:"spiffe_id"`
	Attestation string    `json:"attestation"`
	Selectors   []string  `json:"selectors"`
	AttestedAt  time.Time `json:"attested_at"`
	Connected   bool      `json:"connected"`
}

// connectedAgent waits for the only agent to be connected and as wanted.
func connectedAgent(t *testing.T, d *stage.Domain, what string, wanted func(attestedAgent) bool) attestedAgent {
	t.Helper()
	var agents []attestedAgent
	stage.Eventually(t, what, func() error {
		out, stderr, err := d.Try("agent", "list", "-o", "json")
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		stage.Decode(t, out, &agents)
		if len(agents) != 1 || !agents[0].Connected || !wanted(agents[0]) {
			return fmt.Errorf("agents are %+v", agents)
		}
		return nil
	})
	return agents[0]
}

// comesBackByItself lets the agent's own SVID expire while the CA is down, and
// evicts it while the CA is up: the node attests again each time, and its
// workload is served all along. Banned, it stays away.
func comesBackByItself(t *testing.T, d *stage.Domain, ttl time.Duration) attestedAgent {
	t.Helper()
	first := connectedAgent(t, d, "the node is attested", func(attestedAgent) bool { return true })
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/me"), "--parent", first.SPIFFEID, "--selector", "unix:uid:0", "--ttl", "1h")
	serves := func() error {
		_, err := fetch(t, d)
		return err
	}
	stage.Eventually(t, "an SVID is served", serves)

	d.CA.Kill()
	expired := time.Now().Add(ttl + time.Second) // whatever was issued last
	for time.Now().Before(expired) {
		if err := serves(); err != nil {
			t.Fatalf("while the CA was down the workload got no SVID: %v", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	d.CA.Restart()
	back := connectedAgent(t, d, "the node attests again, its SVID having expired", func(a attestedAgent) bool { return a.AttestedAt.After(first.AttestedAt) })

	d.Merlon("agent", "evict", first.SPIFFEID)
	again := connectedAgent(t, d, "the evicted node attests again", func(a attestedAgent) bool { return a.AttestedAt.After(back.AttestedAt) })
	if again.SPIFFEID != first.SPIFFEID || again.Attestation != first.Attestation {
		t.Errorf("the node was %s by %s and came back as %s by %s", first.SPIFFEID, first.Attestation, again.SPIFFEID, again.Attestation)
	}
	stage.Eventually(t, "an SVID is served after that", serves)

	d.Merlon("agent", "ban", first.SPIFFEID)
	stage.Eventually(t, "the agent says that it is banned", func() error {
		if log := d.Agent.Log(); !strings.Contains(log, "merlon agent unban") {
			return errors.New(log)
		}
		return nil
	})
	if out := d.Merlon("agent", "show", first.SPIFFEID, "-o", "json"); !strings.Contains(out, `"state": "banned"`) || strings.Contains(out, `"connected": true`) {
		t.Errorf("the banned node came back by its evidence: %s", out)
	}
	return again
}

const shortAgentTTL = 5 * time.Second

func TestNodeWithACertificateComesBackByItself(t *testing.T) {
	files := stage.Certify(t, stage.Dir(t), "rack1-7")
	d := stage.CAAlone(t, "", nil, "agent_svid_ttl: "+shortAgentTTL.String(),
		"node_attestors:", "  x509pop: {ca_file: "+files.CA+", name: common_name}")
	d.StartAgentBy(d.Token().RootHash, "node_attestor: x509pop", "node_cert_file: "+files.Cert, "node_key_file: "+files.Key)
	a := comesBackByItself(t, d, shortAgentTTL)
	if a.SPIFFEID != d.ID("/agent/x509pop/cn/rack1-7") || a.Attestation != "x509pop" {
		t.Errorf("the node is %s by %s", a.SPIFFEID, a.Attestation)
	}
}

func TestRefusedCertificateSaysWhatToDo(t *testing.T) {
	good, other := stage.Certify(t, stage.Dir(t), "rack1-7"), stage.Certify(t, stage.Dir(t), "rack1-8")
	d := stage.CAAlone(t, "", nil, "node_attestors:", "  x509pop: {ca_file: "+good.CA+"}")
	d.StartAgentBy(d.Token().RootHash, "node_attestor: x509pop", "node_cert_file: "+other.Cert, "node_key_file: "+other.Key)
	stage.Eventually(t, "the log says what to do", func() error {
		if log := d.Agent.Log(); !strings.Contains(log, "does not end in a configured root") || !strings.Contains(log, "see that "+other.Cert) {
			return errors.New(log)
		}
		return nil
	})
	if out := d.Merlon("agent", "list", "-o", "json"); strings.Contains(out, "x509pop") {
		t.Errorf("the refused node is an agent: %s", out)
	}
}

func TestNodeOfAClusterComesBackByItself(t *testing.T) {
	for way, settings := range map[string]func(api *k8sapi.Cluster, dir string) string{
		"JWKS": func(api *k8sapi.Cluster, dir string) string {
			return fmt.Sprintf("issuer: %s, ca_file: %s", api.URL, api.CAFile(dir))
		},
		"TokenReview": func(api *k8sapi.Cluster, dir string) string {
			return fmt.Sprintf("api_server: %s, ca_file: %s, token_file: %s", api.URL, api.CAFile(dir), api.Reviewer(dir, "the-ca"))
		},
	} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			api, dir := k8sapi.Start(t), stage.Dir(t)
			d := stage.CAAlone(t, "", nil, "agent_svid_ttl: "+shortAgentTTL.String(), "node_attestors:", "  k8s:",
				fmt.Sprintf("    - {cluster: prod, audience: %s, service_accounts: [\"%s:%s\"], %s}", k8sapi.Audience, k8sapi.Namespace, k8sapi.Account, settings(api, dir)))
			token := api.Project(dir, "worker-1")
			d.StartAgentBy(d.Token().RootHash, "node_attestor: k8s", "k8s_cluster: prod", "k8s_token_file: "+token)
			a := comesBackByItself(t, d, shortAgentTTL)
			if want := d.ID("/agent/k8s/prod/" + k8sapi.NodeUID("worker-1")); a.SPIFFEID != want || a.Attestation != "k8s" || !slices.Contains(a.Selectors, "k8s:node-name:worker-1") {
				t.Errorf("the node is %s by %s with %q; want %s", a.SPIFFEID, a.Attestation, a.Selectors, want)
			}
		})
	}
}

// An instance of a cloud, whose metadata server and issuer are served here: it
// attests once, and again when an operator has evicted it.
func TestInstanceOfACloudAttestsOnce(t *testing.T) {
	p, dir := oidcprovider.Start(t), stage.Dir(t)
	caFile := filepath.Join(dir, "issuer.pem")
	if err := os.WriteFile(caFile, p.CertificatePEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	metadata := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		claims := p.Claims(r.URL.Query().Get("audience"), "1", time.Now())
		claims["iss"], claims["jti"] = "https://accounts.google.com", time.Now().UnixNano()
		claims["google"] = map[string]any{"compute_engine": map[string]any{"project_id": "shop-prod", "instance_id": "441", "zone": "europe-west1-b"}}
		w.Header().Set("Metadata-Flavor", "Google")
		fmt.Fprint(w, p.Token(claims))
	}))
	t.Cleanup(metadata.Close)
	d := stage.CAAlone(t, "", nil, "node_attestors:",
		fmt.Sprintf("  gcp: {audience: \"https://ca.test\", projects: [shop-prod], keys_url: %s, ca_file: %s}", p.URL+oidcprovider.KeysPath, caFile))
	d.StartAgentBy(d.Token().RootHash, "node_attestor: gcp", "node_audience: https://ca.test", "node_metadata_url: "+metadata.URL)
	first := connectedAgent(t, d, "the instance is attested", func(attestedAgent) bool { return true })
	if first.SPIFFEID != d.ID("/agent/gcp/shop-prod/441") || !slices.Contains(first.Selectors, "gcp:zone:europe-west1-b") {
		t.Errorf("the node is %s with %q", first.SPIFFEID, first.Selectors)
	}
	other := *d // another process on the instance, say
	other.SetDir(stage.Dir(t))
	other.StartAgentBy(d.Token().RootHash, "node_attestor: gcp", "node_audience: https://ca.test", "node_metadata_url: "+metadata.URL)
	stage.Eventually(t, "a second agent of the instance is refused", func() error {
		if log := other.Agent.Log(); !strings.Contains(log, "merlon agent evict") {
			return errors.New(log)
		}
		return nil
	})
	other.Agent.Stop()
	d.Merlon("agent", "evict", first.SPIFFEID)
	connectedAgent(t, d, "the evicted instance attests again", func(a attestedAgent) bool { return a.AttestedAt.After(first.AttestedAt) })
}

// An instance of EC2, whose metadata service is served here, and signs what a key
// of our own signs, by openssl: it attests once per start.
func TestInstanceOfEC2AttestsOncePerStart(t *testing.T) {
	dir := stage.Dir(t)
	signer := filepath.Join(dir, "amazon.pem")
	if _, err := openssl(t.Context(), "", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", signer+".key", "-out", signer, "-days", "2", "-subj", "/O=Cloud"); err != nil {
		t.Fatal(err)
	}
	var started atomic.Pointer[time.Time]
	start := func(at time.Time) { started.Store(&at) }
	start(time.Now())
	metadata := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			fmt.Fprint(w, "AQAEAs4WBg==")
			return
		}
		document := fmt.Sprintf(`{"accountId" : "123456789012", "region" : "eu-central-1", "instanceId" : "i-0123456789abcdef0", "pendingTime" : %q}`, started.Load().UTC().Format(time.RFC3339))
		message, err := openssl(r.Context(), document, "cms", "-sign", "-binary", "-nodetach", "-nocerts", "-md", "sha256", "-signer", signer, "-inkey", signer+".key", "-outform", "DER", "-stream", "-indef")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, base64.StdEncoding.EncodeToString(message))
	}))
	t.Cleanup(metadata.Close)
	d := stage.CAAlone(t, "", nil, "node_attestors:", "  aws: {accounts: [\"123456789012\"], certificates: {eu-central-1: "+signer+"}}")
	settings := []string{"node_attestor: aws", "node_metadata_url: " + metadata.URL}
	d.StartAgentBy(d.Token().RootHash, settings...)
	first := connectedAgent(t, d, "the instance is attested", func(attestedAgent) bool { return true })
	if first.SPIFFEID != d.ID("/agent/aws/123456789012/eu-central-1/i-0123456789abcdef0") || !slices.Contains(first.Selectors, "aws:region:eu-central-1") {
		t.Errorf("the node is %s with %q", first.SPIFFEID, first.Selectors)
	}
	other := *d
	other.SetDir(stage.Dir(t))
	other.StartAgentBy(d.Token().RootHash, settings...)
	says := func(d *stage.Domain, what, word string) {
		stage.Eventually(t, what, func() error {
			if log := d.Agent.Log(); !strings.Contains(log, word) {
				return errors.New(log)
			}
			return nil
		})
	}
	says(&other, "a second agent of the instance is refused", "merlon agent evict")
	other.Agent.Stop()
	d.Merlon("agent", "evict", first.SPIFFEID)
	says(d, "the document that was used brings no evicted instance back", "this very token or document")
	start(time.Now().Add(time.Second)) // stopped and started
	connectedAgent(t, d, "the instance that was started again is attested", func(a attestedAgent) bool { return a.AttestedAt.After(first.AttestedAt) })
}

func openssl(ctx context.Context, in string, arguments ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "openssl", arguments...)
	cmd.Stdin = strings.NewReader(in)
	return cmd.Output()
}

// T37: what is secret is in no log, metric, environment or file of a running CA, agent,
// sidecar and service, and their memory stays theirs.

package attacks_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
)

func TestSecretsAreInNoOutput(t *testing.T) {
	c := startTown(t)
	secrets, issued := secretsOf(t, c)
	// Each is used where it could be written down.
	request := fmt.Sprintf("GET /hello?key=query-canary HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nCookie: cookie-canary\r\nX-Api-Key: key-canary\r\nConnection: close\r\n\r\n", issued)
	for _, canary := range []string{"query-canary", "cookie-canary", "key-canary", "bearer-canary", "basic-canary"} {
		secrets[canary] = []byte(canary)
	}
	for _, request := range []string{
		request, strings.Replace(request, "GET", "POST", 1), strings.Replace(request, "/hello", "/hello%00", 1),
		"GET / HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic basic-canary\r\nAuthorization: Bearer bearer-canary\r\n: malformed cookie-canary\r\n\r\n",
	} {
		c.send(t, "shop", request)
		c.send(t, "orders", request)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	for _, token := range []string{string(secrets["bundle reader's token"]), issued, "bearer-canary"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.HTTPS+"/v1/policy/bundles/main?key=query-canary", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
	}
	second := secondAgent(t, c, string(secrets["join token that was used"]))
	stage.Eventually(t, "denials are in the agent's log of decisions", func() error {
		text, err := os.ReadFile(c.decisionLog)
		if err == nil && !bytes.Contains(text, []byte("METHOD")) {
			err = errors.New("none yet")
		}
		return err
	})

	outputs := outputsOf(t, c)
	outputs["the log of a second agent"] = []byte(second.Log())
	// What is looked for can be found.
	planted := append([]byte("a"), secrets["join token that was used"]...)
	if len(found(planted, secrets)) != 1 || len(outputs) < 25 {
		t.Fatalf("of the planted token %v is found, in %d outputs", found(planted, secrets), len(outputs))
	}
	for where, text := range outputs {
		for _, what := range found(text, secrets) {
			t.Errorf("%s holds the %s", where, what)
		}
		if bytes.Contains(text, []byte("PRIVATE KEY")) {
			t.Errorf("%s holds a private key in PEM", where)
		}
	}
}

// secretsOf are a workload's key and token, and what operators were given.
func secretsOf(t *testing.T, c *town) (secrets map[string][]byte, token string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	api, err := workloadapi.New(ctx, workloadapi.WithAddr(c.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	held, err := api.FetchX509SVID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	jwt, err := api.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	key := held.PrivateKey.(*ecdsa.PrivateKey)
	scalar, err := key.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var reader struct{ Token string }
	stage.Decode(t, c.Merlon("token", "create", "--kind", "bundle-reader", "-o", "json"), &reader)
	config, err := os.ReadFile(filepath.Join(filepath.Dir(c.AgentData()), "agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(config), "join_token: ")
	used, _, _ := strings.Cut(rest, "\n")
	// In whichever form somebody prints them. The token's claims are no secret, its
	// signature makes it one.
	signature := jwt.Marshal()[strings.LastIndexByte(jwt.Marshal(), '.')+1:]
	return map[string][]byte{
		"workload's key": scalar, "workload's key in hex": []byte(hex.EncodeToString(scalar)), "workload's key in decimal": []byte(new(big.Int).SetBytes(scalar).String()),
		"workload's key in base64": []byte(base64.StdEncoding.EncodeToString(der)), "workload's key as bytes": fmt.Append(nil, scalar),
		"JWT-SVID": []byte(signature), "bundle reader's token": []byte(reader.Token), "join token that was used": []byte(used),
		"join token": []byte(c.Token("--agent", "later").Token),
	}, jwt.Marshal()
}

func found(text []byte, secrets map[string][]byte) (what []string) {
	for name, secret := range secrets {
		if bytes.Contains(text, secret) {
			what = append(what, name)
		}
	}
	return what
}

// outputsOf is everything that the processes let others see: what they wrote, what
// they answer to everybody, how they were started.
func outputsOf(t *testing.T, c *town) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for name, p := range c.processes() {
		all["the log of "+name], all["the output of "+name] = []byte(p.Log()), []byte(p.Stdout())
		for _, file := range []string{"environ", "cmdline"} {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID(), file))
			if err != nil {
				t.Fatal(err)
			}
			all["/proc/PID/"+file+" of "+name] = text
		}
	}
	for name, address := range map[string]string{"merlon-ca": c.Health, "merlon-agent": c.AgentHealth, "merlon-sidecar": c.sidecarHealth} {
		code, text := get(t, "http://"+address+"/metrics")
		if code != http.StatusOK {
			t.Fatalf("metrics of %s: %d %s", name, code, text)
		}
		all["the metrics of "+name] = []byte(text)
	}
	for _, args := range [][]string{
		{"entry", "list", "-o", "json"}, {"agent", "list", "-o", "json"}, {"revocation", "list", "-o", "json"}, {"policy", "status", "-o", "json"},
	} {
		all["merlon "+strings.Join(args, " ")] = []byte(c.Merlon(args...))
	}
	log, err := os.ReadFile(c.decisionLog)
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(log) {
		var event struct {
			DecisionID string `json:"decision_id"`
		}
		stage.Decode(t, string(line), &event)
		if stdout, _, err := stage.Run(t.Context(), t, []string{"MERLON_ADMIN=" + c.AgentAdmin}, "merlon", "explain", "decision", event.DecisionID, "--trace"); err == nil {
			all["merlon explain decision "+event.DecisionID] = []byte(stdout)
		}
	}
	for _, dir := range []string{c.CAData(), c.AgentData(), filepath.Dir(c.accessLog)} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			all[path], err = os.ReadFile(path)
			if filepath.Ext(path) == ".pem" && filepath.Dir(path) == filepath.Dir(c.accessLog) {
				delete(all, path) // the test's own, for the bundle endpoint
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

// secondAgent tries a token on another machine, until it is told that it does not do.
func secondAgent(t *testing.T, c *town, token string) *stage.Process {
	t.Helper()
	dir := stage.Dir(t)
	p := stage.Start(t, "merlon-agent", []string{"MERLON_AGENT_JOIN_TOKEN=" + token}, "-trust-domain", c.TrustDomain, "-ca-address", c.GRPC, "-root-hash", c.Token().RootHash,
		"-data-dir", filepath.Join(dir, "data"), "-public-socket", filepath.Join(dir, "p", "api.sock"), "-admin-socket", filepath.Join(dir, "a", "admin.sock"),
		"-health-address", "off", "-log-level", "debug")
	stage.Eventually(t, "the second agent is refused", func() error {
		if !strings.Contains(p.Log(), "refuses the join token") {
			return errors.New("not yet")
		}
		return nil
	})
	return p
}

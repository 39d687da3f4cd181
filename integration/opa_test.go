// A stock OPA, knowing nothing of Merlon, loads the CA's policy bundle with
// signature verification on and answers from it.

package integration_test

import (
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"merlon.dev/integration/stage"
)

// stockOPA builds the module's own command, outside our go.mod.
func stockOPA(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "install", "github.com/open-policy-agent/opa@v1.22.2")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build a stock OPA: %v\n%s", err, out)
	}
	return filepath.Join(dir, "opa")
}

const quickstartPolicy = "../examples/quickstart/policy"

func TestStockOPALoadsThePolicyBundle(t *testing.T) {
	opa := stockOPA(t)
	d := stage.Dev(t, "--policy", quickstartPolicy)
	answers := runOPA(t, opa, opaConfig(t, d, d.HTTPS, d.CABundle))
	stage.Eventually(t, "the stock OPA answers from the bundle", func() error {
		return errors.Join(
			answers.expect("GET", true, "ALLOWED"),
			answers.expect("DELETE", false, "METHOD"),
		)
	})
	next := t.TempDir()
	old, err := os.ReadFile(filepath.Join(quickstartPolicy, "grants.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(old, []byte("[GET]"), []byte("[DELETE]"), 1)
	if err := os.WriteFile(filepath.Join(next, "grants.yaml"), changed, 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", next)
	stage.Eventually(t, "the stock OPA takes the next generation", func() error {
		return errors.Join(
			answers.expect("GET", false, "METHOD"),
			answers.expect("DELETE", true, "ALLOWED"),
		)
	})
}

// The same OPA refuses a bundle of which one byte changed on the way.
func TestStockOPARefusesATamperedBundle(t *testing.T) {
	opa := stockOPA(t)
	d := stage.Dev(t, "--policy", quickstartPolicy)
	proxy := tamperingProxy(t, d)
	answers := runOPA(t, opa, opaConfig(t, d, proxy.URL, proxyCA(t, proxy)))
	stage.Eventually(t, "the stock OPA names the bad signature", func() error {
		if log := answers.log.String(); !strings.Contains(log, "Bundle load failed") {
			return errors.New("it said nothing of the kind")
		}
		return nil
	})
	if err := answers.expect("GET", true, "ALLOWED"); err == nil {
		t.Error("the stock OPA answers from a tampered bundle")
	}
}

// opaConfig writes what an operator would write by hand.
func opaConfig(t *testing.T, d *stage.Domain, server, ca string) string {
	t.Helper()
	var token struct {
		Token string `json:"token"`
	}
	stage.Decode(t, d.Merlon("token", "create", "--kind", "bundle-reader", "-o", "json"), &token)
	var keys []struct {
		KID       string `json:"kid"`
		PublicKey string `json:"public_key"`
	}
	stage.Decode(t, d.Merlon("policy", "key", "-o", "json"), &keys)
	config, err := json.Marshal(map[string]any{
		"services": map[string]any{"merlon": map[string]any{
			"url":         server + "/v1/policy",
			"tls":         map[string]any{"ca_cert": ca},
			"credentials": map[string]any{"bearer": map[string]any{"token": token.Token}},
		}},
		"keys": map[string]any{keys[0].KID: map[string]any{"algorithm": "ES256", "key": keys[0].PublicKey}},
		"bundles": map[string]any{"main": map[string]any{
			"service": "merlon", "resource": "bundles/main",
			"signing": map[string]any{"keyid": keys[0].KID},
			"polling": map[string]any{"long_polling_timeout_seconds": 30},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "opa.json")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// opaServer is a running stock OPA.
type opaServer struct {
	url  string
	log  *stage.Buffer
	stop func()
}

func runOPA(t *testing.T, opa, config string) *opaServer {
	t.Helper()
	addr := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	log := &stage.Buffer{}
	cmd := exec.Command(opa, "run", "--server", "--addr", addr, "--config-file", config, "--disable-telemetry")
	cmd.Stderr, cmd.Stdout = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("log of opa:\n%s", log)
		}
	})
	return &opaServer{url: "http://" + addr, log: log, stop: stop}
}

// expect asks for web's call of orders.
func (s *opaServer) expect(method string, allow bool, reason string) error {
	input := fmt.Sprintf(`{"input": {"attributes": {
		"source": {"principal": "spiffe://dev.local/web"}, "destination": {"principal": "spiffe://dev.local/orders"},
		"request": {"http": {"method": %q, "path": "/orders/1"}}},
		"protocol": "http"}}`, method)
	resp, err := (&http.Client{}).Post(s.url+"/v1/data/merlon/decision", "application/json", strings.NewReader(input))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var got struct {
		Result struct {
			Allow  bool   `json:"allow"`
			Reason string `json:"reason"`
		} `json:"result"`
	}
	if err := json.Unmarshal(body, &got); err != nil {
		return err
	}
	if got.Result.Allow != allow || got.Result.Reason != reason {
		return fmt.Errorf("%s answered %s; want allow %v, reason %s", method, body, allow, reason)
	}
	return nil
}

// tamperingProxy hands on what the CA says and changes one byte of each body.
func tamperingProxy(t *testing.T, d *stage.Domain) *httptest.Server {
	t.Helper()
	target, err := url.Parse(d.HTTPS)
	if err != nil {
		t.Fatal(err)
	}
	roots, err := os.ReadFile(d.CABundle)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}}
	proxy.ModifyResponse = func(resp *http.Response) error {
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		changed := tampered(body)
		resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(changed)), int64(len(changed))
		resp.Header.Set("Content-Length", strconv.Itoa(len(changed)))
		return nil
	}
	srv := httptest.NewTLSServer(proxy)
	t.Cleanup(srv.Close)
	return srv
}

// tampered changes one word inside a gzipped tarball, and nothing else about
// it; what is no tarball stays as it is.
func tampered(body []byte) []byte {
	zr, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return body
	}
	raw, err := io.ReadAll(zr)
	if err != nil {
		return body
	}
	var out bytes.Buffer
	zw := gzip.NewWriter(&out)
	zw.Write(bytes.Replace(raw, []byte("web-reads-orders"), []byte("web-reads-0rders"), 1))
	zw.Close()
	return out.Bytes()
}

// proxyCA writes the certificate of the test's own proxy.
func proxyCA(t *testing.T, srv *httptest.Server) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "proxy.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(path, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

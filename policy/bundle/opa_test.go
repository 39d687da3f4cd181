package bundle

// Stock OPA, built from its module, loads our bundles from our server with
// signature verification on, answers as our engine does, and refuses what was
// tampered with.

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const opaVersion = "v1.22.2"

// stockOPA builds the opa command once and keeps it in the user's cache.
var stockOPA = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "merlon-test", "opa-"+opaVersion)
	binary := filepath.Join(dir, "opa")
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Another test process may be building it too: install aside, then move.
	temp, err := os.MkdirTemp(dir, "build")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	cmd := exec.Command("go", "install", "github.com/open-policy-agent/opa@"+opaVersion)
	cmd.Env = append(os.Environ(), "GOBIN="+temp, "GOFLAGS=-mod=mod", "CGO_ENABLED=0")
	cmd.Dir = temp
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %s", err, out)
	}
	return binary, os.Rename(filepath.Join(temp, "opa"), binary)
})

const readerToken = "bundle-reader-token"

// authorized stands for what the CA does around the server.
func authorized(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+readerToken {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// runOPA starts `opa run --server` that polls srv and returns its base URL.
func runOPA(t *testing.T, srv *httptest.Server, key *ecdsa.PublicKey) (base string, logs *logBuffer) {
	t.Helper()
	binary, err := stockOPA()
	if err != nil {
		t.Fatalf("build opa: %v", err)
	}
	dir := t.TempDir()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(dir, "ca.pem")
	writePEM(t, ca, "CERTIFICATE", srv.Certificate().Raw)
	config, err := json.Marshal(map[string]any{
		"services": map[string]any{"merlon": map[string]any{
			"url": srv.URL, "tls": map[string]any{"ca_cert": ca},
			"credentials": map[string]any{"bearer": map[string]any{"token": readerToken}},
		}},
		"keys": map[string]any{"policy-1": map[string]any{
			"algorithm": "ES256", "key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})),
		}},
		"bundles": map[string]any{"main": map[string]any{
			"service": "merlon", "resource": "v1/policy/bundles/main",
			"signing": map[string]any{"keyid": "policy-1"},
			"polling": map[string]any{"long_polling_timeout_seconds": 10, "min_delay_seconds": 1, "max_delay_seconds": 2},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "config.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	logs = &logBuffer{}
	cmd := exec.CommandContext(t.Context(), binary, "run", "--server", "--disable-telemetry", "--addr", address, "--config-file", file)
	cmd.Stdout, cmd.Stderr = logs, logs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("opa: %s", logs)
		}
	})
	return "http://" + address, logs
}

func writePEM(t *testing.T, name, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// logBuffer collects the output of a process while it runs.
type logBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// eventually polls until done, which is how one waits for another process.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(what)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// ask queries data.merlon.decision and returns its reason; empty if undefined.
func ask(ctx context.Context, client *http.Client, base, method, path string) string {
	body := fmt.Sprintf(`{"input":{"attributes":{"source":{"principal":"spiffe://shop.test/web"},"destination":{"principal":"spiffe://shop.test/orders"},`+
		`"request":{"http":{"method":%q,"path":%q,"headers":{}}}}}}`, method, path)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/data/merlon/decision", strings.NewReader(body))
	if err != nil {
		return err.Error()
	}
	resp, err := client.Do(req)
	if err != nil {
		return "" // it is still starting
	}
	defer resp.Body.Close()
	var answer struct {
		Result struct{ Reason string }
	}
	raw, _ := io.ReadAll(resp.Body)
	_ = json.Unmarshal(raw, &answer)
	return answer.Result.Reason
}

func TestStockOPALoadsAndAnswers(t *testing.T) {
	if testing.Short() {
		t.Skip("builds opa")
	}
	key, _ := newKey(t)
	shelf := newShelf(NewPublished(sign(t, build(t, shop), metadata(1), key), 1))
	srv := httptest.NewTLSServer(authorized(NewServer(Source{Load: shelf.load})))
	t.Cleanup(srv.Close)
	base, _ := runOPA(t, srv, &key.PublicKey)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	eventually(t, "opa activates the bundle", func() bool { return ask(t.Context(), client, base, "GET", "/orders/1") != "" })

	for call, want := range map[string]string{
		"GET /orders/1": "ALLOWED", "GET /orders/1?x=/../y": "ALLOWED", "DELETE /orders/1": "METHOD", "GET /admin": "PATH",
		"GET /orders/1/refund": "DENY_RULE", "GET /orders/%2e%2e/admin": "BAD_REQUEST",
	} {
		method, path, _ := strings.Cut(call, " ")
		if got := ask(t.Context(), client, base, method, path); got != want {
			t.Errorf("%s: %s; want %s", call, got, want)
		}
	}

	// The long poll brings the next generation.
	next := build(t, folder(t, map[string]string{"g.yaml": "grants:\n  - {id: no, http: {}, effect: deny}\n"}))
	shelf.publish(NewPublished(sign(t, next, metadata(2), key), 2))
	eventually(t, "opa activates the next generation", func() bool { return ask(t.Context(), client, base, "GET", "/orders/1") == "DENY_RULE" })
}

func TestStockOPARefusesATamperedBundle(t *testing.T) {
	if testing.Short() {
		t.Skip("builds opa")
	}
	key, _ := newKey(t)
	f, err := unpack(sign(t, build(t, shop), metadata(1), key))
	if err != nil {
		t.Fatal(err)
	}
	f["authz.rego"] = append(bytes.Clone(f["authz.rego"]), "\nallow := true\n"...)
	tampered, err := pack(f)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewTLSServer(authorized(NewServer(Source{Load: newShelf(NewPublished(tampered, 1)).load})))
	t.Cleanup(srv.Close)
	base, logs := runOPA(t, srv, &key.PublicKey)
	eventually(t, "opa complains", func() bool { return strings.Contains(logs.String(), "digest mismatch") })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	eventually(t, "opa serves", func() bool {
		resp, err := client.Get(base + "/health")
		if err != nil {
			return false
		}
		return resp.Body.Close() == nil
	})
	if got := ask(t.Context(), client, base, "GET", "/orders/1"); got != "" {
		t.Errorf("opa answered %s by a tampered bundle", got)
	}
}

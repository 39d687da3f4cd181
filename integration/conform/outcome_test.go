// What could not be checked: a row fails, the reports are written anyway, and the exit
// code is another one than that of a MUST that is not kept.

package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// outcomes runs the tool, which has to write both reports.
func outcomes(t *testing.T, args ...string) (results []*result, code int) {
	t.Helper()
	junit := filepath.Join(t.TempDir(), "junit.xml")
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), append([]string{"run", "-o", "json", "--junit", junit}, args...), &stdout, &stderr)
	if err := json.Unmarshal(stdout.Bytes(), &results); err != nil || len(results) != len(checklist) {
		t.Errorf("JSON of %d requirements, %v; %s", len(results), err, stderr.String())
	}
	if text, err := os.ReadFile(junit); err != nil || !strings.Contains(string(text), "<testsuite") {
		t.Errorf("JUnit: %q, %v", text, err)
	}
	return results, code
}

func failedWith(results []*result, id, what string) bool {
	return slices.ContainsFunc(results, func(r *result) bool {
		return r.ID == id && r.Status == fail && strings.Contains(strings.Join(r.Findings, "\n"), what)
	})
}

func TestEndpointThatCannotBeChecked(t *testing.T) {
	for name, tt := range map[string]struct {
		answer   http.HandlerFunc
		id, what string
	}{
		"not found":    {http.NotFound, "F-10", "404"},
		"moved":        {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/", http.StatusMovedPermanently) }, "F-12", "301"},
		"HTML":         {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>no bundle</html>") }, "B4", "no JSON"},
		"another list": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "[]") }, "B4", "no JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewTLSServer(tt.answer)
			defer srv.Close()
			ca := filepath.Join(t.TempDir(), "ca.pem")
			if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
				t.Fatal(err)
			}
			results, code := outcomes(t, "--bundle-url", srv.URL+"/bundle", "--bundle-ca", ca)
			if code != 3 || !failedWith(results, tt.id, tt.what) {
				t.Errorf("exit code %d; want 3, and %s failed with %q", code, tt.id, tt.what)
			}
		})
	}
}

func TestWorkloadAPIWithoutIdentity(t *testing.T) {
	results, code := outcomes(t, "--socket", "unix://"+filepath.Join(t.TempDir(), "nobody.sock"))
	if code != 3 || !failedWith(results, "E9", "needs an identity") {
		t.Errorf("exit code %d; want 3, and E9 failed", code)
	}
}

// A server that refuses what is sound is not checked further; another target is.
func TestServerThatRefusesTheControl(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprint(conn, "no TLS")
			conn.Close()
		}
	}()
	dir := t.TempDir()
	if err := forgeTo(dir, io.Discard); err != nil {
		t.Fatal(err)
	}
	results, code := outcomes(t, "--forge", dir, "--server", lis.Addr().String(), "--consumer", "/nonexistent/consumer")
	if code != 3 || !failedWith(results, "X13", "refuses a sound X509-SVID") || !failedWith(results, "F-6", "consumer") {
		t.Errorf("exit code %d; want 3, X13 and F-6 failed", code)
	}
}

// A target of which nothing passed, nor failed a MUST, has not been checked.
func TestNothingPassed(t *testing.T) {
	o := options{bundleURL: "https://a.test"}
	r := newReport()
	r.fail("B7", endpoint, "bad")
	if err := o.passedNothing(r.list(o.given, o.missing)); err == nil {
		t.Error("nothing passed, and it is no error")
	}
	r.ok("B4", endpoint)
	if err := o.passedNothing(r.list(o.given, o.missing)); err != nil {
		t.Errorf("something passed: %v", err)
	}
}

// The exit code of a MUST that is not kept is 1, and of nonsense 2.
func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want int
	}{
		{[]string{"run"}, 2},
		{[]string{"run", "--bundle-url", "http://a.test"}, 2},
		{[]string{"run", "--bundle-url", "https://u@a.test"}, 2},
		{[]string{"help"}, 0},
	} {
		t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
		if code := run(t.Context(), tt.args, io.Discard, io.Discard); code != tt.want {
			t.Errorf("%q: exit code %d; want %d", tt.args, code, tt.want)
		}
	}
}

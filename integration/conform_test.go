// spiffe-conform against the real CA and agent, the SDK's validator and, for
// comparison, go-spiffe's alone.

package integration_test

import (
	"crypto/tls"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

// conformResult is what spiffe-conform prints of a requirement.
type conformResult struct {
	ID, Level, Status string
	Findings, Remarks []string
	Checks            int
}

// conformer is the tool with forged SVIDs, trusted by d as example.org.
type conformer struct {
	bin, dir string
	d        *stage.Domain
}

func newConformer(t *testing.T, d *stage.Domain) conformer {
	t.Helper()
	c := conformer{filepath.Join(stage.Dir(t), "spiffe-conform"), t.TempDir(), d}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", c.bin, "./conform").CombinedOutput(); err != nil {
		t.Fatalf("build spiffe-conform: %v\n%s", err, out)
	}
	if out, err := exec.CommandContext(t.Context(), c.bin, "forge", c.dir).CombinedOutput(); err != nil {
		t.Fatalf("forge: %v\n%s", err, out)
	}
	d.Merlon("federation", "set", "example.org", filepath.Join(c.dir, "bundle.json"))
	for path, exe := range map[string]string{"/conform": c.bin, "/server": executable(t)} {
		d.Merlon("entry", "create", "--spiffe-id", d.ID(path), "--selector", "unix:path:"+exe, "--federates-with", "example.org")
	}
	return c
}

func executable(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// run gives the results by requirement, and the tool's exit code.
func (c conformer) run(t *testing.T, args ...string) (map[string]conformResult, int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), c.bin, append([]string{"run", "-o", "json", "--forge", c.dir}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var results []conformResult
	if jsonErr := json.Unmarshal(out, &results); jsonErr != nil {
		t.Fatalf("spiffe-conform: %v, %v\n%s%s", err, jsonErr, out, stderr.String())
	}
	byID := make(map[string]conformResult)
	for _, r := range results {
		byID[r.ID] = r
	}
	return byID, cmd.ProcessState.ExitCode()
}

// Every MUST that was checked is kept, and much was checked.
func TestMerlonConforms(t *testing.T) {
	t.Parallel()
	d := stage.Dev(t)
	c := newConformer(t, d)
	id, err := sdk.Open(t.Context(), sdk.WithAgentAddress(d.WorkloadAPI), sdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: httpauth.Handler(id, http.NotFoundHandler()), TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 5 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	go srv.ServeTLS(lis, "", "")
	defer srv.Close()

	serve := reservedAddress(t)
	go callOften(t, httpauth.Client(id, sdk.ID("spiffe://example.org/a")), "https://"+serve)
	junit := filepath.Join(t.TempDir(), "junit.xml")
	results, code := c.run(t, "--socket", d.WorkloadAPI, "--server", lis.Addr().String(), "--serve", serve, "--junit", junit)
	checked := 0
	for _, r := range results {
		switch {
		case r.Status == "fail":
			t.Errorf("%s (%s): %q", r.ID, r.Level, r.Findings)
		case r.Status == "pass":
			checked++
		case len(r.Findings) == 0:
			t.Errorf("%s is skipped without a reason", r.ID)
		}
		if len(r.Remarks) > 0 {
			t.Errorf("%s: %q", r.ID, r.Remarks)
		}
	}
	if code != 0 || checked < 50 {
		t.Errorf("exit code %d, %d requirements checked", code, checked)
	}
	text, err := os.ReadFile(junit)
	if err != nil {
		t.Fatal(err)
	}
	var suite struct {
		Tests int `xml:"tests,attr"`
	}
	if err := xml.Unmarshal(text, &suite); err != nil || suite.Tests != len(results) {
		t.Errorf("JUnit: %d tests of %d, %v", suite.Tests, len(results), err)
	}
}

// reservedAddress is one that was free a moment ago.
func reservedAddress(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	return lis.Addr().String()
}

// callOften makes calls, on a new connection each, until the test ends.
func callOften(t *testing.T, client *http.Client, url string) {
	for t.Context().Err() == nil {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			panic(err)
		}
		if res, err := client.Do(req); err == nil {
			res.Body.Close()
		} else if _, refused := errors.AsType[*net.OpError](err); refused {
			time.Sleep(10 * time.Millisecond) // nobody serves there yet, or any more
		}
	}
}

// What go-spiffe's validator accepts is found, so the tool finds such things.
func TestConformFindsWhatGoSPIFFEAccepts(t *testing.T) {
	t.Parallel()
	d := stage.Dev(t)
	c := newConformer(t, d)
	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(d.WorkloadAPI)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: 5 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	go srv.Serve(lis)
	defer srv.Close()
	results, code := c.run(t, "--server", lis.Addr().String())
	if code != 1 {
		t.Errorf("exit code %d; want 1", code)
	}
	for id, want := range map[string]string{
		"X4": "uri-names/no-path", "X7": "", "X9": "intermediate-permits-parent", "X10": "key-usage/leaf-has-none", "X11": "key-usage/leaf-key-agreement-only",
		"X6": "trust-domains/intermediate-with-a-path", "X12": "extended-key-usage/leaf-server-only", "ID1": "uri-names/empty-fragment", "ID6": "uri-names/too-long", "X2": "",
	} {
		r := results[id]
		if found := strings.Contains(strings.Join(r.Findings, "\n"), want); want != "" && (r.Status != "fail" || !found) || want == "" && r.Status != "pass" {
			t.Errorf("%s: %s, %q; want %q among what it accepts", id, r.Status, r.Findings, want)
		}
	}
}

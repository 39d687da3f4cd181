// The examples as their READMEs run them.

package integration_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

// example builds an example under the names of its workloads, and registers them.
func example(t *testing.T, d *stage.Domain, name string, workloads ...string) (bins []string) {
	t.Helper()
	built := stage.Bin(t, stage.Build(t, "example-"+name, "examples/"+name, ""))
	dir := t.TempDir()
	for _, workload := range workloads {
		bin := filepath.Join(dir, workload)
		if out, err := exec.Command("cp", built, bin).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		d.Merlon("entry", "create", "--spiffe-id", d.ID("/"+workload), "--selector", "unix:path:"+bin)
		bins = append(bins, bin)
	}
	return bins
}

// runs has an example run until the test ends.
func runs(t *testing.T, d *stage.Domain, bin string, args ...string) {
	t.Helper()
	var out stage.Buffer
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s printed:\n%s", bin, out.String())
		}
	})
}

// says waits until an example that ends prints want.
func says(t *testing.T, d *stage.Domain, want, bin string, args ...string) {
	t.Helper()
	stage.Eventually(t, filepath.Base(bin)+" says "+want, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, bin, args...)
		cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

func TestExamples(t *testing.T) {
	for name, test := range map[string]struct{ grant, path, answer string }{
		"http": {"http: {methods: [GET]}", "/orders/1", "/orders/1 for spiffe://dev.local/web"},
		"grpc": {"grpc: {services: [grpc.health.v1.Health]}", "", "SERVING"},
	} {
		t.Run(name, func(t *testing.T) {
			d := stage.Dev(t)
			bins := example(t, d, name, "orders", "web")
			address := fmt.Sprintf("localhost:%d", stage.FreePort(t))
			serve, call := []string{"serve", address}, []string{"call", address}
			if test.path != "" {
				serve, call = append(serve, "/orders/"), append(call, test.path)
			}
			runs(t, d, bins[0], serve...)
			says(t, d, "NO_BUNDLE", bins[1], call...)
			dir := t.TempDir()
			text := fmt.Sprintf("grants:\n  - id: web\n    from: [%s]\n    to: [%s]\n    %s\n", d.ID("/web"), d.ID("/orders"), test.grant)
			if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			d.Merlon("policy", "push", dir)
			says(t, d, test.answer, bins[1], call...)
		})
	}
}

func TestAdoptionExample(t *testing.T) {
	d := stage.Dev(t)
	bin := example(t, d, "adoption", "orders")[0]
	address := fmt.Sprintf("localhost:%d", stage.FreePort(t))
	runs(t, d, bin, "-address", address)
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	for _, step := range []struct{ path, want string }{
		{"/orders/1", "/orders/1 for somebody: NO_IDENTITY"},
		{"/left", `"NO_IDENTITY":2`},
	} {
		stage.Eventually(t, "plaintext is served", func() error {
			res, err := c.Get("http://" + address + step.path)
			if err != nil {
				return err
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil || !strings.Contains(string(body), step.want) {
				return fmt.Errorf("%s: %q, %w", step.path, body, err)
			}
			return nil
		})
	}
}

// merlon-sidecar as a process, beside real CA and agent.

package sidecars_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
)

// TestSidecarFromStartToEnd takes a pair of sidecars through their life: the app is
// started with the policy and not before, a changed configuration is taken in, a bad
// one is not, and the app ends with its sidecar.
func TestSidecarFromStartToEnd(t *testing.T) {
	t.Parallel()
	dir := stage.Dir(t)
	d := stage.Dev(t)
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get("X-Spiffe-Id"))
	}))
	defer app.Close()
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}
	inbound, outbound := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	started := filepath.Join(dir, "started")
	in := stage.Start(t, "merlon-sidecar", env, "exec", "-health-address", "off",
		"-inbound", inbound+","+app.Listener.Addr().String()+",http",
		"--", "sh", "-c", `trap 'touch "$0.ended"; exit 0' TERM; touch "$0"; while :; do sleep 0.02; done`, started)
	config := filepath.Join(dir, "sidecar.yaml")
	configure := func(text string) {
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	good := fmt.Sprintf("health_address: 'off'\noutbound: [{listen: %q, to: shop, upstreams: [%q], protocol: http}]\n", outbound, inbound)
	configure(good)
	out := stage.Start(t, "merlon-sidecar", env, "-config", config)

	stage.Eventually(t, "a denial", func() error { return services.Wants("http://"+outbound+"/", `"reason":"NO_BUNDLE"`) })
	if !strings.Contains(in.Log(), "the command waits for a policy") {
		t.Errorf("the log does not say that the command waits:\n%s", in.Log())
	}
	if _, err := os.Stat(started); err == nil {
		t.Error("the command was started without a policy")
	}
	grants := fmt.Sprintf("grants:\n  - {id: shop, from: [%[1]s], to: [%[1]s], http: {methods: [GET]}}\n", d.ID("/shop"))
	policy := filepath.Join(dir, "policy")
	if err := errors.Join(os.Mkdir(policy, 0o700), os.WriteFile(filepath.Join(policy, "grants.yaml"), []byte(grants), 0o600)); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", policy)
	stage.Eventually(t, "the command", func() error { _, err := os.Stat(started); return err })
	stage.Eventually(t, "an answer", func() error { return services.Wants("http://"+outbound+"/", "200 "+d.ID("/shop")) })

	hangUp := func() {
		if err := syscall.Kill(out.PID(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	configure(good + "idle_timout: 5s\n")
	hangUp()
	stage.Eventually(t, "the refusal", func() error {
		if !strings.Contains(out.Log(), "configuration not reloaded") || !strings.Contains(out.Log(), "idle_timeout") {
			return errors.New(out.Log())
		}
		return nil
	})
	if err := services.Wants("http://"+outbound+"/", "200 "+d.ID("/shop")); err != nil {
		t.Errorf("after a configuration that was refused: %v", err)
	}
	moved := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	configure(strings.Replace(good, outbound, moved, 1))
	hangUp()
	stage.Eventually(t, "an answer at the new address", func() error { return services.Wants("http://"+moved+"/", "200 "+d.ID("/shop")) })
	stage.Eventually(t, "the end of the old address", func() error {
		conn, err := net.Dial("tcp", outbound)
		if err != nil {
			return nil
		}
		conn.Close()
		return errors.New("it still answers")
	})
	in.Stop()
	if _, err := os.Stat(started + ".ended"); err != nil {
		t.Error("the command did not end with its sidecar")
	}
}

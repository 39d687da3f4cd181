// What merlon-sidecar as a process does about replicas that are not well, beside real CA
// and agent.

package sidecars_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
)

// TestSidecarGoesRoundReplicasThatAreIll has two replicas of a service, of which one
// says that it is not well, and then both.
func TestSidecarGoesRoundReplicasThatAreIll(t *testing.T) {
	t.Parallel()
	dir := stage.Dir(t)
	d := stage.Dev(t)
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	grants := fmt.Sprintf("grants:\n  - {id: shop, from: [%[1]s], to: [%[1]s], http: {methods: [GET]}}\n", d.ID("/shop"))
	policy := filepath.Join(dir, "policy")
	if err := errors.Join(os.Mkdir(policy, 0o700), os.WriteFile(filepath.Join(policy, "grants.yaml"), []byte(grants), 0o600)); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", policy)
	env := []string{"SPIFFE_ENDPOINT_SOCKET=" + d.WorkloadAPI}
	var ill [2]atomic.Bool
	var replicas []string
	for i := range ill {
		app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/healthz" && ill[i].Load() {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			fmt.Fprintf(w, "replica %d", i)
		}))
		t.Cleanup(app.Close)
		replicas = append(replicas, fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)))
		stage.Start(t, "merlon-sidecar", env, "-health-address", "off", "-inbound", replicas[i]+","+app.Listener.Addr().String()+",http")
	}
	outbound, metrics := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	config := filepath.Join(dir, "sidecar.yaml")
	text := fmt.Sprintf(`health_address: %q
outbound:
  - listen: %q
    to: shop
    upstreams: [%q, %q]
    protocol: http
    health_check: {kind: http, path: /healthz, interval: 20ms, timeout: 20s, healthy_after: 1, unhealthy_after: 2}
`, metrics, outbound, replicas[0], replicas[1])
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out := stage.Start(t, "merlon-sidecar", env, "-config", config)
	healthy := func(i, n int) error {
		return services.Wants("http://"+metrics+"/metrics", fmt.Sprintf("merlon_sidecar_upstream_healthy{destination=\"shop\",direction=\"outbound\",upstream=%q} %d", replicas[i], n))
	}
	both := func() error { return errors.Join(healthy(0, 1), healthy(1, 1)) }
	stage.Eventually(t, "both replicas to be well", both)
	ill[0].Store(true)
	stage.Eventually(t, "the first to be unhealthy", func() error { return healthy(0, 0) })
	for range 20 {
		if err := services.Wants("http://"+outbound+"/", "200 replica 1"); err != nil {
			t.Errorf("while the first is not well: %v", err)
		}
	}
	ill[1].Store(true)
	stage.Eventually(t, "both to be unhealthy", func() error { return errors.Join(healthy(0, 0), healthy(1, 0)) })
	if err := services.Wants("http://"+outbound+"/", "200 replica"); err != nil {
		t.Errorf("while none is well: %v", err)
	}
	ill[0].Store(false)
	ill[1].Store(false)
	stage.Eventually(t, "both replicas to be well again", both)
	for _, want := range []string{"upstream is unhealthy", "no upstream is healthy", "upstream is healthy again", "GET /healthz: status 503"} {
		if !strings.Contains(out.Log(), want) {
			t.Errorf("the log does not say %q:\n%s", want, out.Log())
		}
	}
}

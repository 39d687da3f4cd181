// merlon-sidecar exports what it counts for Prometheus, and a span for each request, as
// the OTEL_* variables say.

package integration_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/sdktest"
)

func TestSidecarExportsMetricsAndTraces(t *testing.T) {
	c := &otlp{seen: make(map[string]bool)}
	collector := httptest.NewServer(c)
	t.Cleanup(collector.Close)
	app := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(app.Close)
	td := sdktest.New(t)
	td.Allow("web", "orders")
	between, entry := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t)), fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	for name, hop := range map[string][]string{
		"orders": {"-inbound", between + "," + strings.TrimPrefix(app.URL, "http://") + ",http"},
		"web":    {"-outbound", entry + ",orders,http," + between},
	} {
		stage.Start(t, "merlon-sidecar", []string{
			"SPIFFE_ENDPOINT_SOCKET=" + td.Address(name), "OTEL_SERVICE_NAME=" + name,
			"OTEL_EXPORTER_OTLP_ENDPOINT=" + collector.URL, "OTEL_METRIC_EXPORT_INTERVAL=200", "OTEL_BSP_SCHEDULE_DELAY=200",
		}, append([]string{"-health-address", "off"}, hop...)...)
	}
	stage.Eventually(t, "the collector has seen both sidecars", func() error {
		res, err := http.Get("http://" + entry + "/x") //nolint:forbidigo // a program without any identity
		if err != nil {
			return err
		}
		res.Body.Close()
		c.mu.Lock()
		defer c.mu.Unlock()
		var missing []error
		for _, name := range []string{"merlon_sidecar_requests_total", "merlon_sidecar_request_duration_seconds", "merlon.handshakes", "span GET"} {
			for _, service := range []string{"web: ", "orders: "} {
				if !c.seen[service+name] {
					missing = append(missing, fmt.Errorf("%s%s is missing of %v", service, name, c.seen))
				}
			}
		}
		return errors.Join(missing...)
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	for name := range c.seen {
		if strings.HasSuffix(name, ".request.duration") {
			t.Errorf("requests are counted twice: %s", name)
		}
	}
}

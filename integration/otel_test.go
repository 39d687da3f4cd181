// merlon-ca and merlon-agent export their metrics and the spans of their RPCs as the
// OTEL_* variables say.

package integration_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	"google.golang.org/protobuf/proto"

	"merlon.dev/integration/stage"
)

// otlp is a collector that keeps the names of what it gets, as "service: name".
type otlp struct {
	mu   sync.Mutex
	seen map[string]bool // guarded by mu
}

func (c *otlp) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = c.take(r.URL.Path, body)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (c *otlp) take(path string, body []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var metrics collectormetrics.ExportMetricsServiceRequest
	var traces collectortrace.ExportTraceServiceRequest
	switch path {
	case "/v1/metrics":
		if err := proto.Unmarshal(body, &metrics); err != nil {
			return err
		}
	case "/v1/traces":
		if err := proto.Unmarshal(body, &traces); err != nil {
			return err
		}
	}
	for _, r := range metrics.GetResourceMetrics() {
		for _, s := range r.GetScopeMetrics() {
			for _, m := range s.GetMetrics() {
				c.seen[serviceOf(r.GetResource().GetAttributes())+": "+m.GetName()] = true
			}
		}
	}
	for _, r := range traces.GetResourceSpans() {
		for _, s := range r.GetScopeSpans() {
			for _, span := range s.GetSpans() {
				c.seen[serviceOf(r.GetResource().GetAttributes())+": span "+span.GetName()] = true
			}
		}
	}
	return nil
}

// serviceOf is the program of unknown_service:program.
func serviceOf(attrs []*common.KeyValue) string {
	for _, a := range attrs {
		if a.GetKey() == "service.name" {
			return strings.TrimPrefix(a.GetValue().GetStringValue(), "unknown_service:")
		}
	}
	return ""
}

func TestCAAndAgentExportMetricsAndTraces(t *testing.T) {
	c := &otlp{seen: make(map[string]bool)}
	srv := httptest.NewServer(c)
	t.Cleanup(srv.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", srv.URL)
	t.Setenv("OTEL_METRIC_EXPORT_INTERVAL", "200")
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
	d := stage.Separate(t)
	d.Merlon("entry", "list")
	stage.Eventually(t, "the collector has seen both", func() error {
		if _, _, err := stage.Run(t.Context(), t, []string{"MERLON_ADMIN=" + d.AgentAdmin}, "merlon", "explain", "identity", "--pid", strconv.Itoa(os.Getpid())); err != nil {
			return err // it is still starting
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		var missing []error
		for _, name := range []string{
			"merlon-ca: rpc.server.call.duration", "merlon-ca: merlon_build_info", "merlon-ca: go_goroutines",
			"merlon-ca: span merlon.ca.v1.Admin/ListEntries", "merlon-ca: span merlon.ca.v1.Node/Attest",
			"merlon-agent: rpc.server.call.duration", "merlon-agent: merlon_agent_entries",
			"merlon-agent: span merlon.agent.v1.Debug/ExplainIdentity",
		} {
			if !c.seen[name] {
				missing = append(missing, fmt.Errorf("%s is missing of %v", name, c.seen))
			}
		}
		return errors.Join(missing...)
	})
}

// Bytes of the environment: the OTEL_* variables.

package otel

import (
	"log/slog"
	"os"
	"strconv"
	"strings"
	"testing"
)

// Whatever the variables hold, what OpenTelemetry's packages read for themselves is a
// number that they can take, what is exported has somewhere to go, and the environment
// is afterwards as it was.
func FuzzVariables(f *testing.F) {
	f.Add("otlp", "prometheus", "http://127.0.0.1:4317", "grpc", "tracecontext,baggage", "5000")
	f.Add("none", "console", "127.0.0.1:4317", "http/json", "b3, none,", "-1")
	f.Add("", "", "unix:///run/o.sock", "", "", " 9223372036854775807 ")
	f.Add("", "", "https://", "http/protobuf", ",", "1e3")
	f.Fuzz(func(t *testing.T, traces, metrics, endpoint, protocol, propagators, number string) {
		texts := map[string]string{
			"OTEL_TRACES_EXPORTER": traces, "OTEL_METRICS_EXPORTER": metrics, endpointVariable: endpoint,
			"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_PROPAGATORS": propagators,
		}
		for name := range numbers {
			texts[name] = number
		}
		for name, text := range texts {
			if strings.ContainsRune(text, 0) {
				return // no environment holds it
			}
			t.Setenv(name, text)
		}
		log := slog.New(slog.DiscardHandler)
		s := read(log)
		if s.propagator == nil || len(s.propagator.Fields()) > 3 {
			t.Errorf("OTEL_PROPAGATORS=%q makes %v", propagators, s.propagator)
		}
		for wanted, exporter := range map[*bool]string{&s.traces: traces, &s.metrics: metrics} {
			exporter = strings.TrimSpace(exporter)
			if *wanted && (exporter == "" || exporter == "otlp") && variable(endpointVariable) != "" && !strings.Contains(endpoint, ":") {
				t.Errorf("with exporter %q something is sent to %q", exporter, endpoint)
			}
			if *wanted && exporter == "none" {
				t.Error("what is not wanted is exported")
			}
		}
		restore := withoutNonsense(log)
		for name, greatest := range numbers {
			if n, err := strconv.Atoi(variable(name)); variable(name) != "" && (err != nil || n < 1 || n > greatest) {
				t.Errorf("%s=%q is left for others to read", name, os.Getenv(name))
			}
		}
		restore()
		for name, text := range texts {
			if os.Getenv(name) != text {
				t.Errorf("%s was %q and is %q", name, text, os.Getenv(name))
			}
		}
	})
}

// What the OTEL_* variables ask for. OpenTelemetry's own packages read most of
// them, and pass over many that make no sense in silence; here is said which.

package otel

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/propagation"
)

// settings are what is started.
type settings struct {
	traces, metrics bool
	propagator      propagation.TextMapPropagator
}

const endpointVariable = "OTEL_EXPORTER_OTLP_ENDPOINT"

// signal is one of traces and metrics, by the variables that are about it.
type signal struct {
	what, exporter, endpoint, protocol string
	exporters                          []string
}

var (
	traceSignal = signal{
		what: "traces", exporter: "OTEL_TRACES_EXPORTER", endpoint: "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
		protocol: "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", exporters: []string{"otlp", "console", "none"},
	}
	metricSignal = signal{
		what: "metrics", exporter: "OTEL_METRICS_EXPORTER", endpoint: "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
		protocol: "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", exporters: []string{"otlp", "prometheus", "console", "none"},
	}
)

// read takes the variables in, and says in log which make no sense.
func read(log *slog.Logger) settings {
	if strings.EqualFold(variable("OTEL_SDK_DISABLED"), "true") {
		return settings{}
	}
	s := settings{traces: traceSignal.wanted(log), metrics: metricSignal.wanted(log)}
	s.propagator = propagatorOf(log, variable("OTEL_PROPAGATORS"))
	return s
}

// variable is the value of name; an empty one counts as none, as OpenTelemetry
// has it.
func variable(name string) string { return strings.TrimSpace(os.Getenv(name)) }

func warn(log *slog.Logger, name, want, instead string) {
	log.LogAttrs(context.Background(), slog.LevelWarn, "an OTEL_* variable makes no sense",
		slog.String("variable", name), slog.String("value", variable(name)), slog.String("want", want), slog.String("instead", instead))
}

// wanted says whether the signal is to be exported: if an exporter is named, or an
// address to send it to, and all that makes sense.
func (s signal) wanted(log *slog.Logger) bool {
	instead := s.what + " are not exported"
	exporter := variable(s.exporter)
	if exporter == "none" || exporter == "" && variable(endpointVariable) == "" && variable(s.endpoint) == "" {
		return false
	}
	if exporter != "" && !slices.Contains(s.exporters, exporter) {
		warn(log, s.exporter, strings.Join(s.exporters, ", "), instead)
		return false
	}
	if exporter != "" && exporter != "otlp" {
		return true
	}
	if name := firstSet(s.protocol, "OTEL_EXPORTER_OTLP_PROTOCOL"); name != "" && !slices.Contains([]string{"grpc", "http/protobuf"}, variable(name)) {
		warn(log, name, "grpc, http/protobuf", instead)
		return false
	}
	if name := firstSet(s.endpoint, endpointVariable); name != "" && !goodEndpoint(variable(name)) {
		warn(log, name, "http://HOST:PORT or https://HOST:PORT", instead)
		return false
	}
	return true
}

// firstSet is the first of the variables that has a value.
func firstSet(names ...string) string {
	for _, name := range names {
		if variable(name) != "" {
			return name
		}
	}
	return ""
}

// goodEndpoint says whether s is a URL that leads somewhere. Of one without a scheme
// the exporters would make their default address.
func goodEndpoint(s string) bool {
	u, err := url.Parse(s)
	if err != nil {
		return false
	}
	return (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" || u.Scheme == "unix" && u.Path != ""
}

const (
	maxSpans        = 1 << 20             // that wait, or are sent at once: memory for them is set aside at the start
	maxMilliseconds = 24 * 60 * 60 * 1000 // far below where a time.Duration overflows
)

// numbers are the variables that are whole numbers above 0, with the greatest that
// make sense. OpenTelemetry's packages read them themselves: they say nothing of those
// that are none, and with others they panic, or never rest.
var numbers = map[string]int{
	"OTEL_BSP_MAX_QUEUE_SIZE": maxSpans, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": maxSpans,
	"OTEL_BSP_SCHEDULE_DELAY": maxMilliseconds, "OTEL_BSP_EXPORT_TIMEOUT": maxMilliseconds,
	"OTEL_METRIC_EXPORT_INTERVAL": maxMilliseconds, "OTEL_METRIC_EXPORT_TIMEOUT": maxMilliseconds,
	"OTEL_EXPORTER_OTLP_TIMEOUT": maxMilliseconds, "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": maxMilliseconds, "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT": maxMilliseconds,
}

// withoutNonsense takes the numbers out of the environment that make no sense, so that
// whoever reads them takes the default, and says so in log. restore puts them back.
func withoutNonsense(log *slog.Logger) (restore func()) {
	aside := make(map[string]string)
	for name, greatest := range numbers {
		v := variable(name)
		if v == "" {
			continue
		}
		if n, err := strconv.Atoi(v); err != nil || n <= 0 || n > greatest {
			warn(log, name, fmt.Sprintf("a whole number from 1 to %d", greatest), "the default is used")
			aside[name] = os.Getenv(name)
			_ = os.Unsetenv(name) // a name without "=" or NUL can be
		}
	}
	return func() {
		for name, v := range aside {
			_ = os.Setenv(name, v) // likewise
		}
	}
}

// propagatorOf is how traces travel: by W3C Trace Context and Baggage, if names,
// separated by commas, do not say otherwise.
func propagatorOf(log *slog.Logger, names string) propagation.TextMapPropagator {
	if names == "" {
		return propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})
	}
	var all []propagation.TextMapPropagator
	for name := range strings.SplitSeq(names, ",") {
		switch strings.TrimSpace(name) {
		case "tracecontext":
			all = append(all, propagation.TraceContext{})
		case "baggage":
			all = append(all, propagation.Baggage{})
		case "none":
		default:
			warn(log, "OTEL_PROPAGATORS", "tracecontext, baggage, none", fmt.Sprintf("%q is passed over", name))
		}
	}
	return propagation.NewCompositeTextMapPropagator(all...)
}

// Package health tells operators, load balancers and Prometheus how a Merlon
// process fares: /live, /ready and /metrics over HTTP, and the gRPC health
// protocol, all from one set of named readiness checks. CA, agent and sidecar
// share it.
package health

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Limits of the HTTP side. A probe sends a few hundred bytes and no body;
// whoever sends more or dawdles is not a probe (SECURITY.md T38).
const (
	headerTimeout  = 5 * time.Second
	requestTimeout = 10 * time.Second
	idleTimeout    = time.Minute
	maxHeaderBytes = 8 << 10
	drainTimeout   = 2 * time.Second
	// maxConnections keeps any user of the machine from using up the files
	// that the process may open.
	maxConnections = 1000
)

// Server holds the readiness checks and the metrics of one process. Its
// methods are safe for concurrent use.
type Server struct {
	log      *slog.Logger
	registry *prometheus.Registry
	stopping chan struct{}
	stopOnce sync.Once

	mu     sync.RWMutex // guards checks and notes
	checks []namedCheck // sorted by name
	notes  map[string]func() string
}

type namedCheck struct {
	name string
	run  func() error
}

// Report is the answer of /ready.
type Report struct {
	Ready  bool              `json:"ready"`
	Checks map[string]Result `json:"checks"`
	// Notes say what is amiss and no reason to send callers elsewhere.
	Notes map[string]string `json:"notes,omitempty"`
}

// Result is the outcome of one check.
type Result struct {
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
}

// New returns a server without checks, which is ready, and with the metrics
// of the Go runtime, of the process and of its build.
func New(logger *slog.Logger) *Server {
	s := &Server{log: logger, registry: prometheus.NewRegistry(), stopping: make(chan struct{}), notes: make(map[string]func() string)}
	s.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		buildInfo(),
	)
	return s
}

// Check registers a readiness check. check returns nil when its part can do
// its work, and otherwise what is wrong; operators see the text, so it holds
// no secret. It is called by each probe, concurrently, and must not block: it
// reports a state that somebody else keeps. Registering a name again replaces
// its check.
func (s *Server) Check(name string, check func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, found := slices.BinarySearchFunc(s.checks, name, func(c namedCheck, name string) int {
		return strings.Compare(c.name, name)
	})
	if found {
		s.checks[i].run = check
		return
	}
	s.checks = slices.Insert(s.checks, i, namedCheck{name, check})
}

// Note adds to the report what note says, unless that is nothing. It is called as
// a check is.
func (s *Server) Note(name string, note func() string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes[name] = note
}

// Registry is where the process registers its metrics.
func (s *Server) Registry() *prometheus.Registry { return s.registry }

// Report runs every check. A server that is stopping is not ready.
func (s *Server) Report() Report {
	s.mu.RLock()
	checks, notes := slices.Clone(s.checks), maps.Clone(s.notes)
	s.mu.RUnlock()
	r := Report{Ready: true, Checks: make(map[string]Result, len(checks))}
	for name, note := range notes {
		if text := note(); text != "" {
			if r.Notes == nil {
				r.Notes = make(map[string]string)
			}
			r.Notes[name] = text
		}
	}
	for _, c := range checks {
		if err := c.run(); err != nil {
			r.Ready = false
			r.Checks[c.name] = Result{Error: err.Error()}
			continue
		}
		r.Checks[c.name] = Result{OK: true}
	}
	if s.isStopping() {
		r.Ready = false
	}
	return r
}

// Stop makes the server report "not ready" from now on and ends every gRPC
// Watch, which would hold up a graceful stop of its gRPC server. Serve calls
// it when its context ends.
func (s *Server) Stop() { s.stopOnce.Do(func() { close(s.stopping) }) }

func (s *Server) isStopping() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// Handler serves /live, /ready and /metrics, for GET and HEAD.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = w.Write([]byte("live\n")) // the prober may be gone; nothing to do about it
	})
	mux.HandleFunc("GET /ready", s.serveReady)
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{
		ErrorLog:            metricsLog{s.log},
		MaxRequestsInFlight: 4,
		Timeout:             requestTimeout / 2,
	}))
	return mux
}

func (s *Server) serveReady(w http.ResponseWriter, _ *http.Request) {
	report := s.Report()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !report.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(report) // as above
}

// Serve answers on lis until ctx ends, then reports "not ready", lets running
// requests finish for a moment and returns nil. It closes lis. The endpoints
// carry no authentication: listen on loopback.
func (s *Server) Serve(ctx context.Context, lis net.Listener) error {
	srv := &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(netutil.LimitListener(lis, maxConnections)) }()
	select {
	case err := <-done:
		s.Stop()
		return err
	case <-ctx.Done():
	}
	s.Stop()
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		srv.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// metricsLog carries promhttp's complaints into the injected logger.
type metricsLog struct{ log *slog.Logger }

func (l metricsLog) Println(v ...any) {
	for _, each := range v {
		if err, ok := each.(error); ok {
			l.log.LogAttrs(context.Background(), slog.LevelWarn, "metrics incomplete", slog.Any("err", err))
		}
	}
}

// buildInfo says which build runs, as the go command recorded it.
func buildInfo() prometheus.Collector {
	labels := prometheus.Labels{"version": "unknown", "revision": "unknown", "go_version": runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" {
			labels["version"] = info.Main.Version
		}
		for _, setting := range info.Settings {
			if setting.Key == "vcs.revision" {
				labels["revision"] = setting.Value
			}
		}
	}
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "merlon_build_info",
		Help:        "Always 1; the labels say which build runs.",
		ConstLabels: labels,
	})
	gauge.Set(1)
	return gauge
}

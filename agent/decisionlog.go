// The log of decisions: where it goes, what it shows, and what is counted.

package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/policy/decisionlog"
	"merlon.dev/sdk/svid"
)

const (
	defaultDecisionLogMiB  = 64
	defaultDecisionLogKeep = 4

	toStdout = "stdout"
	toCA     = "ca"

	byReason = "reason"
	byRow    = "row"

	// decisionRecords wait to be written, and decisionRows are counted, of one service
	// as many as it counts itself.
	decisionRecords     = 8192
	decisionRows        = 4096
	decisionRowsService = 1024
	// gather is how long events wait for others before they are packed together.
	gather = time.Second
)

func checkHeaderNames(field string, names []string) error {
	for _, name := range names {
		if name == "" || name != strings.ToLower(name) || strings.ContainsAny(name, " \t*,;=") {
			return &InvalidError{Field: field, Reason: fmt.Sprintf("%q is not the name of a header in lower case", name)}
		}
	}
	return nil
}

func (c Config) checkDecisionLog() error {
	if c.DecisionLogFile != "" && c.DecisionLogFile != toStdout && !filepath.IsAbs(c.DecisionLogFile) {
		return &InvalidError{Field: "decision_log_file", Reason: fmt.Sprintf("%q is neither an absolute path nor stdout", c.DecisionLogFile)}
	}
	if c.DecisionLogFile == toStdout && c.DecisionLogGzip {
		return &InvalidError{Field: "decision_log_gzip", Reason: "standard output is not packed"}
	}
	if c.DecisionLogMaxMiB < 1 {
		return &InvalidError{Field: "decision_log_max_mib", Reason: fmt.Sprintf("%d is less than 1", c.DecisionLogMaxMiB)}
	}
	if c.DecisionLogKeep < 1 {
		return &InvalidError{Field: "decision_log_keep", Reason: fmt.Sprintf("%d is less than 1", c.DecisionLogKeep)}
	}
	if c.DecisionMetrics != byReason && c.DecisionMetrics != byRow {
		return &InvalidError{Field: "decision_metrics", Reason: fmt.Sprintf("%q is neither reason nor row", c.DecisionMetrics)}
	}
	if err := c.checkDecisionUpload(); err != nil {
		return err
	}
	for _, name := range c.DecisionLogHeaders {
		if decisionlog.SecretHeader(name) {
			return &InvalidError{Field: "decision_log_headers", Reason: name + " carries secrets, and is never written down"}
		}
	}
	return checkHeaderNames("decision_log_headers", c.DecisionLogHeaders)
}

func (c Config) checkDecisionUpload() error {
	to := c.DecisionLogUpload
	u, err := url.Parse(to)
	switch {
	case to == "" || to == toCA:
		for field, value := range map[string]string{"decision_log_ca_file": c.DecisionLogCAFile, "decision_log_token_file": c.DecisionLogTokenFile} {
			if value != "" {
				return &InvalidError{Field: field, Reason: "is of no use without a URL in decision_log_upload"}
			}
		}
	case err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Fragment != "":
		return &InvalidError{Field: "decision_log_upload", Reason: "is neither ca nor an https URL", Hint: "decision_log_upload: https://logs.example.org/logs"}
	}
	return nil
}

// openDecisionLog counts decisions, and writes them down where it is told to. Off
// unless an operator says where: the log tells who called whom for what, and takes
// disk. The counts and the last decisions, for explanations, are always there.
func (a *Agent) openDecisionLog() error {
	targets, err := a.decisionTargets()
	if err != nil {
		return err
	}
	o := decisionlog.Options{Records: decisionRecords, Rows: decisionRows, RowsPerDestination: decisionRowsService}
	if len(targets) == 0 {
		o.Records = -1
	}
	a.decisions = decisionlog.NewRecorder(o)
	a.decisionLog = decisionlog.NewWriter(a.decisions, decisionlog.Format{
		Labels: func() map[string]string {
			return map[string]string{"id": a.client.ID().String(), "app": "merlon-agent", "trust_domain": a.td.Name()}
		},
		Bundle: a.cfg.PolicyBundle,
		Mask:   decisionlog.Mask{Headers: a.cfg.DecisionLogHeaders, Query: a.cfg.DecisionLogQuery},
	}, a.log, targets...)
	a.registerDecisionMetrics(targets)
	return nil
}

func (a *Agent) decisionTargets() (targets []decisionlog.Target, err error) {
	switch path := a.cfg.DecisionLogFile; path {
	case "":
	case toStdout:
		targets = append(targets, decisionlog.Target{Name: "stdout", Output: decisionlog.Stream{W: os.Stdout}})
	default:
		file, err := decisionlog.OpenFile(decisionlog.FileOptions{
			Path: path, MaxBytes: int64(a.cfg.DecisionLogMaxMiB) << 20, Keep: a.cfg.DecisionLogKeep, Gzip: a.cfg.DecisionLogGzip,
		})
		if err != nil {
			return nil, fmt.Errorf("decision_log_file: %w", err)
		}
		t := decisionlog.Target{Name: "file", Output: file}
		if a.cfg.DecisionLogGzip {
			t.Gather = gather
		}
		targets = append(targets, t)
	}
	if a.cfg.DecisionLogUpload != "" {
		upload, err := a.decisionUpload()
		if err != nil {
			return nil, err
		}
		targets = append(targets, decisionlog.Target{Name: "upload", Output: upload, Gather: gather})
	}
	return targets, nil
}

func (a *Agent) decisionUpload() (*decisionlog.Upload, error) {
	if a.cfg.DecisionLogUpload == toCA {
		return &decisionlog.Upload{URLs: func() []string { return a.httpsURLs("/v1/logs") }, Client: a.https}, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if a.cfg.DecisionLogCAFile != "" {
		roots, err := os.ReadFile(a.cfg.DecisionLogCAFile)
		if err != nil {
			return nil, fmt.Errorf("decision_log_ca_file: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(roots) {
			return nil, &InvalidError{Field: "decision_log_ca_file", Reason: a.cfg.DecisionLogCAFile + " has no certificate in PEM"}
		}
	}
	u := &decisionlog.Upload{
		URLs:   func() []string { return []string{a.cfg.DecisionLogUpload} },
		Client: &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, TLSHandshakeTimeout: svid.HandshakeTimeout, ForceAttemptHTTP2: true}},
	}
	if path := a.cfg.DecisionLogTokenFile; path != "" {
		u.Token = func() (string, error) {
			token, err := os.ReadFile(path)
			return string(token), err
		}
	}
	return u, nil
}

// writeDecisions runs until end is called, which writes what is left: it is for
// after the sockets are closed.
func (a *Agent) writeDecisions(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.decisionLog.Run(ctx)
	}()
	return func() { cancel(); <-done }
}

func (a *Agent) registerDecisionMetrics(targets []decisionlog.Target) {
	to := a.health.Registry()
	to.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "merlon_agent_decision_log_lost_total", Help: "Denials and dry-run differences for which there was no room, in the agent or in a service; the next event of the log says how many were lost before it.",
	}, func() float64 { return float64(a.decisions.Dropped()) }))
	for _, t := range targets {
		for outcome, of := range map[string]func(decisionlog.Stats) uint64{
			"written": func(s decisionlog.Stats) uint64 { return s.Written },
			"dropped": func(s decisionlog.Stats) uint64 { return s.Dropped },
			"refused": func(s decisionlog.Stats) uint64 { return s.Refused },
		} {
			to.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: "merlon_agent_decision_log_events_total", Help: "Events of the decision log by output, and what became of them: dropped found no room to wait, refused the other side does not take.",
				ConstLabels: prometheus.Labels{"output": t.Name, "outcome": outcome},
			}, func() float64 { return float64(of(a.decisionLog.Stats(t.Name))) }))
		}
	}
	if a.cfg.DecisionMetrics == byRow {
		to.MustRegister(rows{a.decisions})
	}
}

// rows are the exact counts, for those who want SPIFFE IDs in their metrics.
type rows struct{ of *decisionlog.Recorder }

var rowsDesc = prometheus.NewDesc("merlon_agent_decision_rows_total", "Decisions by source, destination, rule and reason; what has no row of its own is under other.",
	[]string{"source", "destination", "rule_id", "reason"}, nil)

// Describe implements prometheus.Collector.
func (rows) Describe(to chan<- *prometheus.Desc) { to <- rowsDesc }

// Collect implements prometheus.Collector.
func (r rows) Collect(to chan<- prometheus.Metric) {
	for _, c := range r.of.Rows() {
		to <- prometheus.MustNewConstMetric(rowsDesc, prometheus.CounterValue, float64(c.N), c.Source, c.Destination, c.RuleID, string(c.Reason))
	}
}

// What enforcement points report: where their decision logs go, and how many there
// are.

package ca

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/ca/internal/report"
	"merlon.dev/policy/decisionlog"
)

func (p *parts) openReports(c Config) (err error) {
	p.health.Registry().MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "merlon_ca_reporting_instances", Help: "Instances of OPA whose status is known to this replica.",
	}, func() float64 { return float64(len(p.statuses.Instances(time.Now()))) }))
	p.decisions, err = report.OpenLog(report.LogOptions{
		File:   decisionlog.FileOptions{Path: c.DecisionLogFile, MaxBytes: int64(c.DecisionLogMaxMiB) << 20, Keep: c.DecisionLogKeep},
		Logger: c.Logger, Metrics: p.health.Registry(),
	})
	if err != nil {
		return fmt.Errorf("decision_log_file: %w", err)
	}
	return nil
}

package report

// This file is where uploaded decision logs go: to a file of bounded size, or, where
// none is configured, nowhere but into the counters.

import (
	"context"
	"errors"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"

	"merlon.dev/policy/decisionlog"
)

// ErrBehind is returned while the file cannot be written and there is no more room
// to wait: the uploader keeps its chunk and comes again.
var ErrBehind = errors.New("the decision log is behind: its file cannot be written, or not fast enough")

// LogOptions are the parts of a Log. All are required but File.
type LogOptions struct {
	// File is where events go; its zero Path means nowhere.
	File    decisionlog.FileOptions
	Logger  *slog.Logger
	Metrics prometheus.Registerer
}

// Log takes in what is left of uploads. It is safe for concurrent use.
type Log struct {
	lines    *decisionlog.Lines // nil: nowhere
	dropped  prometheus.Counter
	foreign  prometheus.Counter
	received prometheus.Counter
}

// OpenLog opens the file, if there is to be one.
func OpenLog(o LogOptions) (*Log, error) {
	events := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "merlon_ca_decision_log_events_total", Help: "Events of uploaded decision logs: received, foreign (left out, because they are about a destination that is none of the uploader's) and dropped (no decision_log_file is configured).",
	}, []string{"outcome"})
	l := &Log{
		dropped: events.WithLabelValues("dropped"), foreign: events.WithLabelValues("foreign"), received: events.WithLabelValues("received"),
	}
	o.Metrics.MustRegister(events)
	if o.File.Path == "" {
		return l, nil
	}
	file, err := decisionlog.OpenFile(o.File)
	if err != nil {
		return nil, err
	}
	const name = "file"
	l.lines = decisionlog.NewLines(o.Logger, decisionlog.Target{Name: name, Output: file})
	for outcome, of := range map[string]func(decisionlog.Stats) uint64{
		"written": func(s decisionlog.Stats) uint64 { return s.Written },
		"lost":    func(s decisionlog.Stats) uint64 { return s.Dropped },
	} {
		o.Metrics.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "merlon_ca_decision_log_" + outcome + "_total", Help: "Events of uploaded decision logs that were " + outcome + "; lost are those that waited for a full disk when the CA ended.",
		}, func() float64 { return float64(of(l.lines.Stats(name))) }))
	}
	return l, nil
}

// Run writes until ctx ends, and then what waits, for 2 s at most.
func (l *Log) Run(ctx context.Context) {
	if l.lines != nil {
		l.lines.Run(ctx)
	}
}

// Put takes c, whole or not at all; then it is ErrBehind.
func (l *Log) Put(c Chunk) error {
	n := float64(len(c.Events))
	if l.lines == nil {
		l.dropped.Add(n)
	} else if !l.lines.TryPut(c.Events) {
		return ErrBehind
	}
	l.received.Add(n + float64(c.Foreign))
	l.foreign.Add(float64(c.Foreign))
	return nil
}

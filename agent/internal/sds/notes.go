// What the operator reads about a stream: the names that stand for nothing, and
// what Envoy has against an answer.

package sds

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/time/rate"

	"merlon.dev/agent/internal/workload"
)

// What one stream can write into the agent's log.
const (
	logFirst = 3
	logEvery = 10 * time.Second
)

// notes is one stream's.
type notes struct {
	log              *slog.Logger
	missed, rejected rate.Sometimes
}

func newNotes(log *slog.Logger) *notes {
	return &notes{
		log:      log,
		missed:   rate.Sometimes{First: logFirst, Interval: logEvery},
		rejected: rate.Sometimes{First: logFirst, Interval: logEvery},
	}
}

// missing says that the caller gets nothing under some names.
func (n *notes) missing(ctx context.Context, p *workload.Process, w *watch, a answer) {
	if len(a.gone) == 0 {
		return
	}
	n.missed.Do(func() {
		n.log.LogAttrs(ctx, slog.LevelInfo, "SDS names stand for nothing", append(who(p, w),
			slog.Any("names", abridge(a.gone)), slog.String("hint", fmt.Sprintf("merlon explain identity --pid %d", p.PID)))...)
	})
}

// refused says what Envoy has against the last answer. It keeps the secrets that
// it had, and the next version is sent all the same.
func (n *notes) refused(ctx context.Context, p *workload.Process, w *watch, words string) {
	if words == "" {
		return
	}
	n.rejected.Do(func() {
		n.log.LogAttrs(ctx, slog.LevelWarn, "Envoy refused secrets", append(who(p, w),
			slog.Any("names", abridge(w.last)), slog.String("err", words))...)
	})
}

func who(p *workload.Process, w *watch) []slog.Attr {
	return []slog.Attr{slog.Int("pid", int(p.PID)), slog.Int("uid", int(p.UID)), slog.String("envoy", w.envoy)}
}

// abridge keeps a line of the log short.
func abridge(names []string) []string {
	const most = 8
	var out []string
	for _, name := range names[:min(len(names), most)] {
		if len(name) > 256 {
			name = name[:256] + "…"
		}
		out = append(out, name)
	}
	if len(names) > most {
		out = append(out, fmt.Sprintf("and %d more", len(names)-most))
	}
	return out
}

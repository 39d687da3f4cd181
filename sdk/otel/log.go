// What OpenTelemetry's packages complain of goes to the program's log: as warnings,
// not over and over, and without what may be a secret.

package otel

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// quiet is how long the same complaint is not repeated: a collector that is away
	// makes one every few seconds.
	quiet = time.Minute
	// maxComplaints is how many are told apart.
	maxComplaints = 100
)

// complaints is an otel.ErrorHandler. It is safe for concurrent use.
type complaints struct {
	log *slog.Logger

	mu   sync.Mutex
	last map[string]time.Time // guarded by mu; by text
}

// Handle implements otel.ErrorHandler.
func (c *complaints) Handle(err error) {
	if err != nil && c.news(err.Error(), time.Now()) {
		c.log.LogAttrs(context.Background(), slog.LevelWarn, "metrics or traces are not exported as they should be", slog.Any("err", err))
	}
}

// news says whether text has not been said within quiet.
func (c *complaints) news(text string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at, ok := c.last[text]; ok && now.Sub(at) < quiet {
		return false
	}
	if c.last == nil || len(c.last) >= maxComplaints {
		c.last = make(map[string]time.Time)
	}
	c.last[text] = now
	return true
}

// internal takes what OpenTelemetry logs of itself: its warnings, which it calls
// level -1, and errors as warnings, and the rest for debugging.
type internal struct{ slog.Handler }

func levelOf(l slog.Level) slog.Level {
	if l >= -1 {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Enabled implements slog.Handler.
func (h internal) Enabled(ctx context.Context, l slog.Level) bool {
	return h.Handler.Enabled(ctx, levelOf(l))
}

// Handle implements slog.Handler.
func (h internal) Handle(ctx context.Context, r slog.Record) error {
	out := slog.NewRecord(r.Time, levelOf(r.Level), "OpenTelemetry: "+r.Message, r.PC)
	r.Attrs(func(a slog.Attr) bool {
		if !strings.Contains(r.Message, "header") || a.Key == "err" { // header fields carry keys
			out.AddAttrs(a)
		}
		return true
	})
	return h.Handler.Handle(ctx, out)
}

package badger

// Badger's log lines, as attributes of ours.

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// logger passes on what Badger reports: its errors and warnings at warn (what
// concerns a caller also comes back as an error), the rest at debug.
type logger struct{ log *slog.Logger }

func (l logger) Errorf(format string, args ...any)   { l.emit(slog.LevelWarn, format, args) }
func (l logger) Warningf(format string, args ...any) { l.emit(slog.LevelWarn, format, args) }
func (l logger) Infof(format string, args ...any)    { l.emit(slog.LevelDebug, format, args) }
func (l logger) Debugf(format string, args ...any)   { l.emit(slog.LevelDebug, format, args) }

func (l logger) emit(level slog.Level, format string, args []any) {
	ctx := context.Background() // Badger has none to pass
	if !l.log.Enabled(ctx, level) {
		return
	}
	l.log.LogAttrs(ctx, level, "badger", slog.String("detail", strings.TrimSpace(fmt.Sprintf(format, args...))))
}

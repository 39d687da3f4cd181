// The log that log_level and log_format ask for: the same in every program.

package settings

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// NewLogger is a log on w: level is debug, info, warn or error, format text or json.
// The error is an *InvalidError.
func NewLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var from slog.Level
	if err := from.UnmarshalText([]byte(level)); err != nil || strings.ContainsAny(level, "+-") {
		return nil, &InvalidError{Field: "log_level", Reason: fmt.Sprintf("%q is none of debug, info, warn, error", level)}
	}
	options := &slog.HandlerOptions{Level: from}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, &InvalidError{Field: "log_format", Reason: fmt.Sprintf("%q is neither text nor json", format)}
}

// The access log: one line of JSON for each request that is over, whoever made it
// and whatever became of it.

package sidecar

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// accessLog is safe for concurrent use. A line is written whole, in one write.
type accessLog struct {
	where string

	mu   sync.Mutex // guards the rest, and that lines do not mix
	file *os.File   // nil: nobody wants it
	buf  []byte
}

func openAccessLog(where string) (*accessLog, error) {
	l := &accessLog{where: where}
	if where == "stdout" {
		l.file = os.Stdout
	}
	return l, l.reopen()
}

// reopen opens the file anew, which may have been moved away.
func (l *accessLog) reopen() error {
	if l.where == off || l.where == "stdout" {
		return nil
	}
	f, err := os.OpenFile(l.where, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open access_log: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Close() // every line has been written
	}
	l.file = f
	return nil
}

func (l *accessLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil && l.file != os.Stdout {
		_ = l.file.Close() // every line has been written
	}
	l.file = nil
}

// write adds the line of a request. A log that cannot be written keeps no request
// from being served.
func (l *accessLog) write(h *hop.Hop, e *hop.Entry) {
	if l.where == off {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.buf = appendEntry(l.buf[:0], h, e)
		_, _ = l.file.Write(l.buf)
	}
}

// appendEntry appends e as a line. What is empty is left out.
func appendEntry(b []byte, h *hop.Hop, e *hop.Entry) []byte {
	b = append(b, `{"time":"`...)
	b = e.Begun.UTC().AppendFormat(b, time.RFC3339Nano)
	b = append(b, `","duration_ms":`...)
	b = strconv.AppendFloat(b, float64(e.Took.Microseconds())/1000, 'f', 3, 64)
	for _, f := range [...]struct{ key, value string }{
		{"direction", string(h.Direction)},
		{"listener", h.Name},
		{"protocol", string(h.Protocol)},
		{"source", e.Source},
		{"destination", h.To},
		{"remote", e.Remote},
		{"upstream", e.Upstream},
		{"method", e.Method},
		{"host", e.Host},
		{"path", e.Path},
		{"grpc_status", e.GRPCStatus},
		{"reason", string(e.Reason)},
	} {
		if f.value != "" {
			b = appendField(b, f.key, f.value)
		}
	}
	if e.Failure != nil {
		b = appendField(b, "failure", e.Failure.Reason)
	}
	if !e.DecisionID.IsZero() {
		b = appendField(b, "decision_id", e.DecisionID.String())
	}
	if e.Status != 0 {
		b = append(b, `,"status":`...)
		b = strconv.AppendInt(b, int64(e.Status), 10)
	}
	b = append(b, `,"bytes_in":`...)
	b = strconv.AppendInt(b, e.BytesIn, 10)
	b = append(b, `,"bytes_out":`...)
	b = strconv.AppendInt(b, e.BytesOut, 10)
	if e.Retries > 0 {
		b = append(b, `,"retries":`...)
		b = strconv.AppendInt(b, int64(e.Retries), 10)
	}
	if e.Err != "" {
		b = appendField(b, "err", e.Err)
	}
	return append(b, '}', '\n')
}

func appendField(b []byte, key, value string) []byte {
	b = append(b, ',', '"')
	b = append(b, key...)
	b = append(b, '"', ':')
	return appendString(b, value)
}

const hexDigits = "0123456789abcdef"

// appendString appends s as JSON. Whatever could steer a terminal is escaped, and
// bytes that are no UTF-8 are replaced (SECURITY.md T36).
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c < 0x7f && c != '"' && c != '\\' {
			i++
			continue
		}
		b = append(b, s[start:i]...)
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case r == utf8.RuneError && n == 1:
			b = append(b, `\ufffd`...)
		case r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= 0x200b && r <= 0x200f || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0xfeff:
			b = append(b, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
		default:
			b = append(b, s[i:i+n]...)
		}
		i += n
		start = i
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

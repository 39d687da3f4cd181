// Package report is what enforcement points tell the CA of themselves, in the form
// that OPA sends: their status, and the log of their decisions. Who may tell what
// is decided around it (ca/internal/web).
package report

// This file reads a body that anybody may have made, within bounds.

import (
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// Limits of one upload: on the way, and unpacked. A stock OPA sends chunks of
// 32 KiB, and those that set it higher find here how high they may.
const (
	MaxBytes         = 1 << 20
	MaxUnpackedBytes = 8 << 20
)

// Scope says which destinations an uploader may report about.
type Scope func(destination string) bool

// InvalidError reports an upload that is not what it should be.
type InvalidError struct{ Reason string }

// Error implements error.
func (e *InvalidError) Error() string { return e.Reason }

func invalid(format string, args ...any) error { return &InvalidError{fmt.Sprintf(format, args...)} }

// ErrTooLarge is returned for what exceeds MaxBytes or MaxUnpackedBytes.
var ErrTooLarge = fmt.Errorf("an upload has at most %d bytes, and unpacked %d: lower decision_logs.reporting.upload_size_limit_bytes", MaxBytes, MaxUnpackedBytes)

// ReadBody reads the body of r, and unpacks it where it is said to be packed. A
// body that unpacks to more than the limit is read no further (attack T29).
func ReadBody(r *http.Request) ([]byte, error) {
	var from io.Reader = &capped{r.Body, MaxBytes}
	switch encoding := strings.Join(r.Header.Values("Content-Encoding"), ","); strings.ToLower(encoding) {
	case "", "identity":
	case "gzip":
		zr, err := gzip.NewReader(from)
		if err != nil {
			return nil, bodyFault(err)
		}
		from = &capped{zr, MaxUnpackedBytes}
	default:
		return nil, invalid("the content encoding %.40q is neither gzip nor none", encoding)
	}
	body, err := io.ReadAll(from)
	if err != nil {
		return nil, bodyFault(err)
	}
	return body, nil
}

func bodyFault(err error) error {
	if errors.Is(err, ErrTooLarge) {
		return ErrTooLarge
	}
	return invalid("the body cannot be read: %v", err)
}

// capped fails with ErrTooLarge where from has more than left bytes.
type capped struct {
	from io.Reader
	left int
}

func (c *capped) Read(p []byte) (int, error) {
	if c.left < 0 {
		return 0, ErrTooLarge
	}
	if len(p) > c.left+1 { // one more than it may have shows that there is more
		p = p[:c.left+1]
	}
	n, err := c.from.Read(p)
	if c.left -= n; c.left < 0 {
		return n, ErrTooLarge
	}
	return n, err
}

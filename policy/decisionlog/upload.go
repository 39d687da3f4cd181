package decisionlog

// This file sends lines over HTTPS as OPA does: an array of events, packed, by POST.

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	// chunkBytes is how much one upload has, before it is packed, and chunkEvents
	// how many events.
	chunkBytes    = 512 << 10
	chunkEvents   = 2000
	uploadTimeout = 10 * time.Second
)

// Upload is an Output.
type Upload struct {
	// URLs are where the log can go, in the order in which they are tried: after a
	// failure it is the next one's turn.
	URLs func() []string
	// Client sends. Its redirects are not followed.
	Client *http.Client
	// Token is read for each upload and shown as a bearer token; nil for none.
	Token func() (string, error)

	turn int
}

// Write implements Output. What the other side says it will never take is refused,
// and the error says why.
func (u *Upload) Write(ctx context.Context, lines [][]byte) (written, refused int, err error) {
	for n := 0; n < len(lines) && err == nil; {
		chunk := lines[n : n+chunkLength(lines[n:])]
		var w, r int
		w, r, err = u.send(ctx, chunk)
		n, written, refused = n+w+r, written+w, refused+r
	}
	return written, refused, err
}

func chunkLength(lines [][]byte) (n int) {
	size := 0
	for n < len(lines) && n < chunkEvents && (n == 0 || size+len(lines[n]) <= chunkBytes) {
		size += len(lines[n])
		n++
	}
	return n
}

// errTooLarge and errRefused are the answers that trying again does not change.
var (
	errTooLarge = errors.New("it is too large")
	errRefused  = errors.New("it is refused")
)

// send uploads lines; in halves, where they are too large together.
func (u *Upload) send(ctx context.Context, lines [][]byte) (written, refused int, err error) {
	err = u.post(ctx, lines)
	switch {
	case err == nil:
		return len(lines), 0, nil
	case errors.Is(err, errTooLarge) && len(lines) > 1:
		half := len(lines) / 2
		if written, refused, err = u.send(ctx, lines[:half]); err == nil {
			var w, r int
			w, r, err = u.send(ctx, lines[half:])
			written, refused = written+w, refused+r
		}
		return written, refused, err
	case errors.Is(err, errTooLarge), errors.Is(err, errRefused):
		return 0, len(lines), err
	}
	u.turn++
	return 0, 0, err
}

func (u *Upload) post(ctx context.Context, lines [][]byte) error {
	urls := u.URLs()
	if len(urls) == 0 {
		return errors.New("upload decision log: nobody to send it to is known yet")
	}
	url := urls[u.turn%len(urls)]
	ctx, cancel := context.WithTimeout(ctx, uploadTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, packed(lines))
	if err != nil {
		return fmt.Errorf("upload decision log: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Content-Encoding", "gzip")
	if u.Token != nil {
		token, err := u.Token()
		if err != nil {
			return fmt.Errorf("upload decision log: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(token))
	}
	client := *u.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("upload decision log: %w", err)
	}
	defer resp.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // for the log; and the connection can be used again
	return judge(url, resp, said)
}

func judge(url string, resp *http.Response, said []byte) error {
	var kind error
	switch {
	case resp.StatusCode/100 == 2:
		return nil
	case resp.StatusCode == http.StatusRequestEntityTooLarge:
		kind = errTooLarge
	case resp.StatusCode == http.StatusBadRequest, resp.StatusCode == http.StatusUnprocessableEntity:
		kind = errRefused
	default:
		return fmt.Errorf("upload decision log: %s answers %s: %.200q", url, resp.Status, said)
	}
	return fmt.Errorf("upload decision log: %s answers %s: %w: %.200q", url, resp.Status, kind, said)
}

// packed is lines as a JSON array, packed.
func packed(lines [][]byte) *bytes.Reader {
	var out bytes.Buffer
	zw := gzip.NewWriter(&out) // into memory, which does not fail
	for i, line := range lines {
		sep := ","
		if i == 0 {
			sep = "["
		}
		_, _ = io.WriteString(zw, sep)
		_, _ = zw.Write(line)
	}
	_, _ = io.WriteString(zw, "]")
	_ = zw.Close()
	return bytes.NewReader(out.Bytes())
}

// Close implements Output.
func (u *Upload) Close() error {
	u.Client.CloseIdleConnections()
	return nil
}

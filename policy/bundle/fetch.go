package bundle

// This file fetches policy bundles. What it returns is not verified.

import (
	"context"
	"fmt"
	"io"
	"net/http"
)

// Fetch gets the policy bundle at url unless the server's current one has the
// entity tag etag (empty for none): then the error is ErrNotModified. The raw
// bytes are for Verify. It follows no redirects, reads at most MaxBytes and
// takes as long as ctx and client allow.
func Fetch(ctx context.Context, client *http.Client, url, etag string) (raw []byte, newETag string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, "", fmt.Errorf("fetch policy bundle: %v", err)
	}
	req.Header.Set("Prefer", "modes=snapshot")
	if etag != "" {
		req.Header.Set("If-None-Match", etag)
	}
	resp, err := withoutRedirects(client).Do(req)
	if err != nil {
		return nil, "", fmt.Errorf("fetch policy bundle: %w", err)
	}
	defer func() { _ = resp.Body.Close() }()
	switch {
	case resp.StatusCode == http.StatusNotModified && etag != "":
		return nil, etag, ErrNotModified
	case resp.StatusCode == http.StatusNotFound:
		return nil, "", fmt.Errorf("fetch policy bundle from %s: %w", url, ErrNotFound)
	case resp.StatusCode != http.StatusOK:
		return nil, "", fmt.Errorf("fetch policy bundle from %s: status %s", url, resp.Status)
	case resp.Header.Get("Content-Type") != ContentType:
		return nil, "", fmt.Errorf("fetch policy bundle from %s: content type %.100q", url, resp.Header.Get("Content-Type"))
	}
	raw, err = io.ReadAll(io.LimitReader(resp.Body, MaxBytes+1))
	if err != nil {
		return nil, "", fmt.Errorf("fetch policy bundle: %w", err)
	}
	if len(raw) > MaxBytes {
		return nil, "", fmt.Errorf("fetch policy bundle from %s: more than %d bytes", url, MaxBytes)
	}
	return raw, resp.Header.Get("ETag"), nil
}

func withoutRedirects(client *http.Client) *http.Client {
	c := *client
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &c
}

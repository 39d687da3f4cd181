// The metadata server of a cloud: it answers every process of the machine, over
// plain HTTP on a link-local address, and nothing else does.

package attest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

const (
	metadataTimeout   = 5 * time.Second
	maxMetadataAnswer = 64 << 10
)

// metadata asks for path with query; header is what shows that a program on the
// machine asks, and not a browser that was told to.
func metadata(ctx context.Context, server, path string, query url.Values, header, value string) (*http.Response, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set(header, value)
	client := &http.Client{
		// No proxy: the address means another machine there.
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("it redirects, which is not followed") },
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadataAnswer+1))
	switch {
	case err != nil:
		return nil, nil, err
	case resp.StatusCode != http.StatusOK:
		return nil, nil, fmt.Errorf("get %s%s: status %d", server, path, resp.StatusCode)
	case len(body) > maxMetadataAnswer:
		return nil, nil, fmt.Errorf("get %s%s: more than %d bytes", server, path, maxMetadataAnswer)
	}
	return resp, body, nil
}

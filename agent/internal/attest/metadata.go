// The metadata server of a cloud: it answers every process of the machine, over
// plain HTTP on a link-local address, and nothing else does. What is asked of it
// is the same with every cloud: no proxy, no redirect, one deadline, a bound.

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

	// linkLocal is where Azure's and Amazon's servers are. What is sent there leaves
	// the machine's host by no route (RFC 3927 §2.7).
	linkLocal = "http://169.254.169.254"

	// attestedBefore ends the advice of all of them.
	attestedBefore = "; an instance that attested before has to be evicted first (merlon agent evict)"
)

// metadataServer is its URL, http://host.
type metadataServer string

// get asks for path; header is what shows that a program on the machine asks, and
// not a browser that was told to.
func (s metadataServer) get(ctx context.Context, path string, query url.Values, header, value string) (http.Header, []byte, error) {
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	return s.ask(ctx, http.MethodGet, path, header, value)
}

func (s metadataServer) ask(ctx context.Context, method, path, header, value string) (http.Header, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, string(s)+path, nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set(header, value)
	resp, err := metadataClient().Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxMetadataAnswer+1))
	switch {
	case err != nil:
		return nil, nil, err
	case resp.StatusCode != http.StatusOK:
		return nil, nil, fmt.Errorf("%s %s: status %d", method, req.URL.Redacted(), resp.StatusCode)
	case len(body) > maxMetadataAnswer:
		return nil, nil, fmt.Errorf("%s %s: more than %d bytes", method, req.URL.Redacted(), maxMetadataAnswer)
	}
	return resp.Header, body, nil
}

func metadataClient() *http.Client {
	return &http.Client{
		// No proxy: the address means another machine there.
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("it redirects, which is not followed") },
	}
}

// How the agent calls the CA's HTTPS port: as itself, and by the SVID that it has now.

package agent

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"time"

	"merlon.dev/sdk/svid"
)

// httpsClient calls the CA's HTTPS port as the agent.
func (a *Agent) httpsClient() *http.Client {
	return &http.Client{
		Transport: current{&http.Transport{
			TLSClientConfig:     a.client.TLS(a.cache, "h2", "http/1.1").Client(),
			DialContext:         (&net.Dialer{Timeout: svid.HandshakeTimeout}).DialContext,
			TLSHandshakeTimeout: svid.HandshakeTimeout,
			ForceAttemptHTTP2:   true,
			// A replica that is gone without a word is left for another.
			HTTP2:           &http.HTTP2Config{SendPingTimeout: 5 * time.Second, PingTimeout: 3 * time.Second},
			IdleConnTimeout: 30 * time.Second, // a new SVID is soon in use here too
		}},
	}
}

// current leaves connections on which the CA does not know the agent any more: the SVID
// that they were made with was revoked, or its authority, and there is another by now.
// Tried again and again they would never be idle for long enough.
type current struct{ *http.Transport }

// maxRefusalBytes is how much of the answer is read before its connection is left.
const maxRefusalBytes = 4 << 10

// RoundTrip implements http.RoundTripper.
func (c current) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := c.Transport.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusUnauthorized {
		return resp, err
	}
	// It is a refusal, read to its end or not.
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusalBytes))
	_ = resp.Body.Close()
	c.CloseIdleConnections()
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}

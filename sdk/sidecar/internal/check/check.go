// Package check asks upstreams, again and again, whether they are well: by connecting,
// by an HTTP request, or by gRPC's health protocol. Each check goes the way of a
// request, over a connection of its own: plainly to an app, by mutual TLS with the one
// expected peer to a service. What the answers mean for an upstream is package hop's.
package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"merlon.dev/sdk/sidecar/internal/hop"
)

// Kind is how an upstream is asked.
type Kind string

// The kinds.
const (
	TCP  Kind = "tcp"  // connect, TLS included
	HTTP Kind = "http" // GET
	GRPC Kind = "grpc" // grpc.health.v1.Health/Check
)

// Check is how the upstreams of one hop are asked. It does not change.
type Check struct {
	Kind  Kind
	HTTP2 bool // by HTTP rather than HTTP/1.1; gRPC always is
	// Path, and Host of the request, which is the upstream's address where empty.
	Path, Host string
	Statuses   []int  // that are well
	Service    string // of gRPC; empty: the server as a whole

	Interval, Timeout time.Duration
	Thresholds        hop.Thresholds
}

// Run checks u until ctx ends: soon, and from then on after pauses that differ by up
// to a fifth from Interval, so that many sidecars do not ask at once. changed is called
// when u has become healthy (nil) or unhealthy.
func (c *Check) Run(ctx context.Context, u *hop.Upstream, changed func(error)) {
	wait := time.NewTimer(rand.N(max(c.Interval/10, 1))) //nolint:gosec // when it is asked is no secret
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
		err := c.Once(ctx, u)
		if ctx.Err() != nil {
			return
		}
		if u.Check(err, c.Thresholds) {
			changed(err)
		}
		wait.Reset(c.Interval*4/5 + rand.N(max(c.Interval*2/5, 1))) //nolint:gosec // likewise
	}
}

// Once asks u once; nil says that it is well.
func (c *Check) Once(ctx context.Context, u *hop.Upstream) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	conn, err := u.Dial(ctx) // and not Connect: one that is full is not ill
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // who waits for it gives up
	defer stop()
	switch c.Kind {
	case TCP:
		return nil
	case GRPC:
		err = c.askGRPC(ctx, u, conn)
	default:
		err = c.askHTTP(ctx, u, conn)
	}
	if err != nil && (ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded)) {
		return fmt.Errorf("%s: no answer in %v", c.what(), c.Timeout)
	}
	return err
}

func (c *Check) what() string {
	if c.Kind == GRPC {
		return fmt.Sprintf("grpc.health.v1.Health/Check of %q", c.Service)
	}
	return "GET " + c.Path
}

// request is the one that asks, with a URL that is good for no other transport.
func (c *Check) request(ctx context.Context, u *hop.Upstream, method, path string, body io.Reader) (*http.Request, error) {
	host := c.Host
	if host == "" {
		if host = u.Address; strings.HasPrefix(host, "unix://") {
			host = "localhost"
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://"+host+path, body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.what(), err)
	}
	r.Header.Set("User-Agent", "merlon-sidecar/health-check")
	return r, nil
}

// maxHead bounds the head of an answer.
const maxHead = 64 << 10

func (c *Check) askHTTP(ctx context.Context, u *hop.Upstream, conn net.Conn) error {
	r, err := c.request(ctx, u, http.MethodGet, c.Path, nil)
	if err != nil {
		return err
	}
	res, err := roundTrip(conn, r, c.HTTP2)
	if err != nil {
		return fmt.Errorf("%s: %w", c.what(), err)
	}
	_ = res.Body.Close() // its status is all that is wanted
	if !slices.Contains(c.Statuses, res.StatusCode) {
		return fmt.Errorf("%s: status %d, and not one of %v", c.what(), res.StatusCode, c.Statuses)
	}
	return nil
}

// roundTrip speaks HTTP over conn, which the caller closes: HTTP/2 with prior
// knowledge, as ALPN has agreed on where it is TLS.
func roundTrip(conn net.Conn, r *http.Request, http2 bool) (*http.Response, error) {
	var one http.Protocols
	one.SetHTTP1(!http2)
	one.SetUnencryptedHTTP2(http2)
	t := &http.Transport{
		Protocols: &one, DisableCompression: true, MaxResponseHeaderBytes: maxHead,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	cc, err := t.NewClientConn(r.Context(), "http", "upstream:0") // which nobody looks up
	if err != nil {
		return nil, err
	}
	return cc.RoundTrip(r)
}

// The client's side: mutual TLS to one expected SPIFFE ID, and denials as
// typed errors.

package httpauth

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"
	"weak"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/telemetry"
)

const (
	maxProblemBytes = 16 << 10
	idleTimeout     = 30 * time.Second
	expectTimeout   = time.Second
	dialTimeout     = 10 * time.Second
)

// Transport makes an http.RoundTripper for https URLs whose servers have to be
// exactly one SPIFFE ID, whatever the host in the URL. It is safe for
// concurrent use and keeps connections for reuse: make one per target and keep
// it as long as the Identity. Proxies of the environment are not used.
//
// A request that the other side's policy denies is a *sdk.DeniedError, which
// errors.As also finds behind the *url.Error of an http.Client.
func Transport(id *sdk.Identity, to sdk.Target) http.RoundTripper {
	t := &transport{id: id, to: to}
	t.inner.Store(t.pool())
	// The Identity does not keep what nobody else has: some make one for each call.
	known := weak.Make(t)
	runtime.AddCleanup(t, func(stop func()) { stop() }, id.OnRotate(func() {
		if t := known.Value(); t != nil {
			t.rotate()
		}
	}))
	return t
}

// Client is an http.Client with a [Transport] to one target.
func Client(id *sdk.Identity, to sdk.Target) *http.Client {
	return &http.Client{Transport: Transport(id, to)}
}

type transport struct {
	id    *sdk.Identity
	to    sdk.Target
	inner atomic.Pointer[http.Transport]
}

func (t *transport) pool() *http.Transport {
	dial := t.id.DialTLS(t.to)
	var pool *http.Transport
	pool = &http.Transport{
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			state := conn.(*tls.Conn).ConnectionState()
			t.id.OnDrain(&state, func() { t.retire(pool) })
			return conn, nil
		},
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return nil, errors.New("httpauth: no connection without TLS")
		},
		ForceAttemptHTTP2:     true,
		IdleConnTimeout:       idleTimeout,
		ExpectContinueTimeout: expectTimeout,
		MaxIdleConnsPerHost:   64,
	}
	return pool
}

// rotate has new requests go over new connections, which show the new
// X509-SVID; requests under way end on the old ones.
func (t *transport) rotate() { t.inner.Swap(t.pool()).CloseIdleConnections() }

// retire does so where a connection of pool is near its end.
func (t *transport) retire(pool *http.Transport) {
	t.inner.CompareAndSwap(pool, t.pool())
	pool.CloseIdleConnections()
}

// CloseIdleConnections closes connections that no request uses. An
// http.Client forwards its method of that name here.
func (t *transport) CloseIdleConnections() { t.inner.Load().CloseIdleConnections() }

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL == nil || r.URL.Scheme != "https" {
		if r.Body != nil {
			_ = r.Body.Close() // as a RoundTripper must, also on errors
		}
		return nil, fmt.Errorf("httpauth: %s is reached by https URLs only", t.to)
	}
	if to := telemetry.Current(); to != nil && !tracedAbove(r) {
		return t.roundTripTold(to, r)
	}
	res, denied, err := t.send(r)
	if denied != nil {
		return nil, denied
	}
	return res, err
}

// send makes the request. A denial comes with its answer, of which the body is closed.
func (t *transport) send(r *http.Request) (*http.Response, *sdk.DeniedError, error) {
	res, err := t.inner.Load().RoundTrip(r)
	if err != nil {
		return nil, nil, err
	}
	denied := denialOf(res)
	if denied != nil {
		_ = res.Body.Close() // it was read as far as it matters
		telemetry.Denied(r.Context(), denied.Reason, denied.DecisionID, denied.Error())
	}
	return res, denied, nil
}

// denialOf reads a Merlon denial, of which res has every mark, and nothing
// else: an application's own 403 stays a response, and so does a denial to which
// the other side's policy gives a body of its own.
func denialOf(res *http.Response) *sdk.DeniedError {
	decision := res.Header.Get(DecisionIDHeader)
	if decision == "" || res.StatusCode < http.StatusBadRequest {
		return nil
	}
	if kind, _, err := mime.ParseMediaType(res.Header.Get("Content-Type")); err != nil || kind != denial.ProblemContentType {
		return nil
	}
	denied := &sdk.DeniedError{Reason: policy.Error, DecisionID: decision}
	if res.Request != nil && res.Request.Method == http.MethodHead {
		return denied // no body says why
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxProblemBytes))
	var p Problem
	if err != nil || json.Unmarshal(body, &p) != nil || p.Type != ProblemType || p.DecisionID != decision {
		res.Body = &rejoined{io.MultiReader(bytes.NewReader(body), res.Body), res.Body}
		return nil
	}
	denied.Reason, denied.Hint = p.Reason, p.Hint
	return denied
}

// rejoined is a body of which a part was read already.
type rejoined struct {
	io.Reader
	io.Closer
}

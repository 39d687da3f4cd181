// What OpenTelemetry is told of HTTP calls: a span and a duration for each, at both
// ends, after its semantic conventions; and the trace goes with the call. Where
// the program has no providers, nothing here runs.
//
// otelhttp has both, but has a time series for each Host field that a caller invents,
// does not count requests that end in a panic, and with otelgrpc would make the SDK
// twice as large.

package httpauth

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"

	"merlon.dev/sdk/internal/telemetry"
)

// serveTold serves a request as serve does, and tells of it. Where otelhttp stands
// in front already, it is left to that.
func (h *handler) serveTold(t *telemetry.Telemetry, w http.ResponseWriter, r *http.Request) {
	if telemetry.TracedAbove(r.Context()) {
		h.serve(w, r)
		return
	}
	scheme := "https"
	if r.TLS == nil {
		scheme = "http"
	}
	method, shared := about(r)
	shared = append(shared, attribute.String("url.scheme", scheme), attribute.String("network.protocol.version", version(r.ProtoMajor, r.ProtoMinor)))
	more := []attribute.KeyValue{attribute.String("url.path", r.URL.Path)}
	if host, port, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		more = append(more, attribute.String("network.peer.address", host))
		if n, err := strconv.Atoi(port); err == nil {
			more = append(more, attribute.Int("network.peer.port", n))
		}
	}
	ctx := telemetry.Propagator().Extract(r.Context(), propagation.HeaderCarrier(r.Header))
	ctx, call := t.Begin(ctx, telemetry.HTTPServer, method, shared, more)
	defer call.End()
	told := &toldWriter{ResponseWriter: w, errorType: "panic"}
	defer told.tell(call, method)
	h.serve(told, r.WithContext(ctx))
	told.errorType = ""
}

// toldWriter keeps what a server has answered.
type toldWriter struct {
	http.ResponseWriter
	status    int
	route     string // the pattern of the http.ServeMux that has served it
	errorType string // panic, until the handler returns
}

// tell tells of the answer.
func (w *toldWriter) tell(call *telemetry.Call, method string) {
	if w.status == 0 {
		w.status = http.StatusOK
		if w.errorType != "" {
			w.status = http.StatusInternalServerError // at most: net/http hangs up
		}
	}
	attrs := []attribute.KeyValue{attribute.Int("http.response.status_code", w.status)}
	if w.route != "" {
		attrs = append(attrs, attribute.String("http.route", w.route))
		call.Rename(method + " " + w.route)
	}
	if w.errorType == "" && w.status >= http.StatusInternalServerError {
		w.errorType = strconv.Itoa(w.status)
	}
	call.Answer(w.errorType, "", attrs...)
}

// servedBy takes the route from the pattern of a request, "GET host/path".
func servedBy(w http.ResponseWriter, pattern string) {
	if told, ok := w.(*toldWriter); ok && pattern != "" {
		if i := strings.IndexByte(pattern, '/'); i >= 0 {
			told.route = pattern[i:]
		}
	}
}

// WriteHeader implements http.ResponseWriter.
func (w *toldWriter) WriteHeader(status int) {
	if w.status == 0 && (status >= http.StatusOK || status == http.StatusSwitchingProtocols) {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Hijack implements http.Hijacker.
func (w *toldWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil && w.status == 0 {
		w.status = http.StatusSwitchingProtocols
	}
	return conn, buffered, err
}

// ReadFrom implements io.ReaderFrom, so that files are still sent by the kernel.
func (w *toldWriter) ReadFrom(r io.Reader) (int64, error) { return io.Copy(w.ResponseWriter, r) }

// WriteString implements io.StringWriter.
func (w *toldWriter) WriteString(s string) (int, error) { return io.WriteString(w.ResponseWriter, s) }

// Push implements http.Pusher.
func (w *toldWriter) Push(target string, opts *http.PushOptions) error {
	if p, ok := w.ResponseWriter.(http.Pusher); ok {
		return p.Push(target, opts)
	}
	return http.ErrNotSupported
}

// Unwrap gives http.ResponseController the rest.
func (w *toldWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// tracedAbove says whether somebody in front, as otelhttp, sends the trace with r
// already, and so tells of the call.
func tracedAbove(r *http.Request) bool { return r.Header.Get("Traceparent") != "" }

// roundTripTold makes a request, and tells of it.
func (t *transport) roundTripTold(to *telemetry.Telemetry, r *http.Request) (*http.Response, error) {
	method, shared := about(r)
	shared = append(shared, telemetry.ServerAddress(r.URL.Host, 443)...)
	target := *r.URL
	target.User, target.RawQuery = nil, "" // either may hold secrets
	ctx, call := to.Begin(r.Context(), telemetry.HTTPClient, method, shared, []attribute.KeyValue{attribute.String("url.full", target.String())})
	sent := r.Clone(ctx) // a RoundTripper must not change its request
	telemetry.Propagator().Inject(ctx, propagation.HeaderCarrier(sent.Header))
	res, denied, err := t.send(sent)
	switch {
	case err != nil:
		call.Answer(kindOf(err), err.Error())
		call.End()
		return nil, err
	case denied != nil:
		call.Answer(strconv.Itoa(res.StatusCode), denied.Error(), answered(res)...)
		call.End()
		return nil, denied
	}
	kind := ""
	if res.StatusCode >= http.StatusBadRequest {
		kind = strconv.Itoa(res.StatusCode)
	}
	call.Answer(kind, "", answered(res)...)
	res.Body = toldBody(call, res.Body)
	return res, nil
}

func answered(res *http.Response) []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.Int("http.response.status_code", res.StatusCode),
		attribute.String("network.protocol.version", version(res.ProtoMajor, res.ProtoMinor)),
	}
}

// kindOf is the error.type of a request without an answer.
func kindOf(err error) string {
	switch {
	case errors.Is(err, context.Canceled):
		return "context.Canceled"
	case errors.Is(err, context.DeadlineExceeded):
		return "context.DeadlineExceeded"
	}
	return fmt.Sprintf("%T", err)
}

// toldBody ends the span when the answer has been read or closed.
func toldBody(call *telemetry.Call, body io.ReadCloser) io.ReadCloser {
	b := &spanBody{ReadCloser: body, call: call}
	if w, ok := body.(io.Writer); ok { // of an answer that switches protocols
		return &struct {
			*spanBody
			io.Writer
		}{b, w}
	}
	return b
}

type spanBody struct {
	io.ReadCloser
	call *telemetry.Call
	once sync.Once
}

// Read implements io.Reader.
func (b *spanBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		b.once.Do(b.call.End)
	default:
		b.once.Do(func() {
			b.call.Broken(fmt.Sprintf("%T", err), err.Error())
			b.call.End()
		})
	}
	return n, err
}

// Close implements io.Closer.
func (b *spanBody) Close() error {
	b.once.Do(b.call.End)
	return b.ReadCloser.Close()
}

// methods are those that the conventions know.
var methods = map[string]bool{
	"GET": true, "HEAD": true, "POST": true, "PUT": true, "DELETE": true,
	"CONNECT": true, "OPTIONS": true, "TRACE": true, "PATCH": true, "QUERY": true,
}

// about gives the name of the span of r, and the attributes of its method. Whoever
// calls can invent methods, and each would make a time series.
func about(r *http.Request) (name string, attrs []attribute.KeyValue) {
	method := r.Method
	if method == "" {
		method = http.MethodGet // as net/http has it
	}
	name = method
	if !methods[method] {
		name, method = "HTTP", "_OTHER"
	}
	return name, append(make([]attribute.KeyValue, 0, 4), attribute.String("http.request.method", method))
}

// version is network.protocol.version.
func version(major, minor int) string {
	if major >= 2 {
		return strconv.Itoa(major)
	}
	return strconv.Itoa(major) + "." + strconv.Itoa(minor)
}

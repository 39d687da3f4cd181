// Requests under way: they end when the policy does not allow them any more.

package httpauth

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
)

// serveLive puts a request to the policy, and serves it if that allows it. When the
// policy denies it while it is under way, its context ends with the denial as cause
// and its body and its answer cannot be read or written any more; the peer gets the
// denial, or a broken answer where one has begun.
func (h *handler) serveLive(w http.ResponseWriter, r *http.Request, in *policy.Input) {
	live := &liveWriter{ResponseWriter: w}
	call := h.id.Begin(r.Context(), r.TLS, in, live.deny)
	defer live.finish()
	defer call.End()
	d := call.Decision()
	if !d.Allow {
		refuse(w, r, d)
		return
	}
	if d.Response != nil {
		addFields(w.Header(), d.Response.ResponseHeaders)
	}
	live.call = call
	served := asDecided(r.WithContext(call), d.Response)
	h.next.ServeHTTP(live, served)
	servedBy(w, served.Pattern)
	if denied, begun := live.finish(); denied != nil {
		if begun {
			panic(http.ErrAbortHandler) // what was sent must not pass for a whole answer
		}
		clear(w.Header()) // what the handler would have said
		refuse(w, r, *denied)
	}
}

// liveWriter is the http.ResponseWriter of a request that the policy may end.
type liveWriter struct {
	http.ResponseWriter
	call *sdk.Call // set before the handler runs

	mu sync.Mutex
	// guarded by mu
	denied   *policy.Decision
	begun    bool // something was sent
	hijacked bool
	finished bool // the handler has returned, and the rest must not be touched
}

// errDenied is what a handler gets that writes on.
type errDenied struct{ policy.Decision }

// Error names the reason.
func (e *errDenied) Error() string { return sdk.DeniedBy(e.Decision).Error() }

// deny ends the request: a handler that is reading or writing goes on with an
// error at once.
func (w *liveWriter) deny(d policy.Decision) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.finished {
		return
	}
	w.denied = &d
	if w.hijacked {
		w.call.Cut("the policy has ended a connection that a handler took over")
		return
	}
	c := http.NewResponseController(w.ResponseWriter)
	past := time.Unix(1, 0)
	_ = c.SetReadDeadline(past) // of a server that has none nobody waits
	if w.begun {
		_ = c.SetWriteDeadline(past) // likewise
	}
}

// finish marks the end of the handler.
func (w *liveWriter) finish() (denied *policy.Decision, begun bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finished = true
	return w.denied, w.begun || w.hijacked
}

// begin is what stands before all that is sent.
func (w *liveWriter) begin() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.denied != nil {
		return &errDenied{*w.denied}
	}
	w.begun = true
	return nil
}

// Write implements http.ResponseWriter.
func (w *liveWriter) Write(b []byte) (int, error) {
	if err := w.begin(); err != nil {
		return 0, err
	}
	return w.ResponseWriter.Write(b)
}

// WriteString implements io.StringWriter.
func (w *liveWriter) WriteString(s string) (int, error) {
	if err := w.begin(); err != nil {
		return 0, err
	}
	return io.WriteString(w.ResponseWriter, s)
}

// WriteHeader implements http.ResponseWriter.
func (w *liveWriter) WriteHeader(status int) {
	if w.begin() == nil {
		w.ResponseWriter.WriteHeader(status)
	}
}

// ReadFrom implements io.ReaderFrom, so that files are still sent by the kernel.
func (w *liveWriter) ReadFrom(r io.Reader) (int64, error) {
	if err := w.begin(); err != nil {
		return 0, err
	}
	return io.Copy(w.ResponseWriter, r)
}

// Flush implements http.Flusher.
func (w *liveWriter) Flush() { _ = w.FlushError() } // an http.Flusher has no error

// FlushError is Flush for http.ResponseController.
func (w *liveWriter) FlushError() error {
	if err := w.begin(); err != nil {
		return err
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack implements http.Hijacker. When the policy denies the request later, the
// connection is cut.
func (w *liveWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.denied != nil {
		return nil, nil, &errDenied{*w.denied}
	}
	conn, buffered, err := http.NewResponseController(w.ResponseWriter).Hijack()
	w.hijacked = w.hijacked || err == nil
	return conn, buffered, err
}

// Push implements http.Pusher.
func (w *liveWriter) Push(target string, opts *http.PushOptions) error {
	if p, ok := w.ResponseWriter.(http.Pusher); ok {
		return p.Push(target, opts)
	}
	return http.ErrNotSupported
}

// Unwrap gives http.ResponseController the deadlines of the connection.
func (w *liveWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

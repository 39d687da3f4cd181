// The server's side: every request is put to the policy before a handler sees
// it.

package httpauth

import (
	"errors"
	"net"
	"net/http"
	"net/url"
	"strings"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk"
	"merlon.dev/sdk/internal/telemetry"
)

// ProblemType is the type of the problem document (RFC 9457) that tells of a
// denial.
const ProblemType = denial.ProblemType

// DecisionIDHeader carries the decision ID of a denial.
const DecisionIDHeader = "X-Decision-Id"

// Handler asks the policy about every request and passes on to next only what
// is allowed; next finds peer and decision by sdk.PeerFromContext and
// sdk.DecisionFromContext. The server has to use id.ServerTLS: on any other
// connection nobody has an identity, and everything is denied.
//
// Handler belongs outside of anything that changes the request's URL: the
// policy decides about the bytes that were sent, and a request whose URL has
// been changed since is denied. Ambiguous paths are answered with 400 and
// never reach next, nor the redirects of an http.ServeMux in it.
//
// What the policy wants sent with its decision is sent: header fields that it adds to
// an allowed request, or takes away from it, are what next sees, and a denial has
// the policy's status, fields and body.
//
// A request that is under way when the policy stops allowing it ends: its context
// is cancelled, with the denial as cause, its body and answer give errors, and the
// peer gets the denial, or a broken answer where one had begun. A connection that
// next has hijacked is cut, as long as ServeHTTP has not returned.
func Handler(id *sdk.Identity, next http.Handler) http.Handler {
	return &handler{id: id, next: next}
}

type handler struct {
	id   *sdk.Identity
	next http.Handler
}

// ServeHTTP implements http.Handler.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if t := telemetry.Current(); t != nil {
		h.serveTold(t, w, r)
		return
	}
	h.serve(w, r)
}

// serve asks the policy, and serves what it allows.
func (h *handler) serve(w http.ResponseWriter, r *http.Request) {
	r = withoutForgedIdentity(r)
	in := &policy.Input{
		Protocol:      policy.HTTP,
		Method:        r.Method,
		Query:         r.URL.RawQuery,
		Host:          r.Host,
		Headers:       sent(r.Header),
		SourceAddress: r.RemoteAddr,
	}
	if _, known := h.id.Peer(r.TLS); !known { // else the connection tells it
		if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
			in.DestinationAddress = local.String()
		}
	}
	path, err := exactPath(r)
	in.Path = path
	if err != nil {
		refuse(w, r, h.id.Refuse(r.Context(), r.TLS, in, err))
		return
	}
	if h.id.Draining(r.TLS) {
		// HTTP/1.1 closes after this answer; HTTP/2 sends GOAWAY and drains.
		w.Header().Set("Connection", "close")
	}
	h.serveLive(w, r, in)
}

// exactPath gives the bytes of the path as they came over the wire, unless
// they are ambiguous, or anything but the path and query of an origin-form
// request (RFC 9112 section 3.2.1), or no longer those that next would see.
//
// The path comes with the error, for the log.
func exactPath(r *http.Request) (string, error) {
	// Not r.URL: it is decoded, and handlers may have changed it.
	path, query, _ := strings.Cut(r.RequestURI, "?")
	if r.Method == http.MethodConnect {
		return path, errors.New("CONNECT would open a tunnel past the policy") // T18
	}
	if err := policy.CheckPath(path); err != nil {
		return path, err // also absolute-form and "*"
	}
	if strings.Contains(query, "#") {
		return path, errors.New("the request target has a fragment")
	}
	sent, err := url.ParseRequestURI(r.RequestURI)
	if err != nil {
		return path, err
	}
	if sent.Path != r.URL.Path || sent.RawPath != r.URL.RawPath || sent.RawQuery != r.URL.RawQuery {
		return path, errors.New("the URL was changed before the policy was asked")
	}
	// HTTP/2 lets a Host field stand beside :authority, and readers disagree
	// about which one counts (T17).
	if hosts := r.Header["Host"]; len(hosts) > 1 || len(hosts) == 1 && hosts[0] != r.Host {
		return path, errors.New("the Host field and :authority differ")
	}
	return path, nil
}

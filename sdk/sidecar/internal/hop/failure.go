// What the sidecar itself answers where no policy has denied a request and no upstream
// has answered it: the same over each form of HTTP, and in gRPC's own form.

package hop

import (
	"encoding/json"
	"errors"
	"net/http"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

// Failure is a reason for which the sidecar answers itself. There are those below, and
// no others.
type Failure struct {
	Reason string // in answers, access log and metrics
	Title  string
	Status int // of HTTP
	Code   codes.Code
}

// The failures.
var (
	Malformed   = &Failure{"BAD_REQUEST", "The request is malformed", http.StatusBadRequest, codes.InvalidArgument}
	Unreachable = &Failure{"UPSTREAM_UNREACHABLE", "No upstream can be reached", http.StatusServiceUnavailable, codes.Unavailable}
	Broken      = &Failure{"UPSTREAM_BROKE_OFF", "The upstream did not answer as it should", http.StatusBadGateway, codes.Unavailable}
	Late        = &Failure{"UPSTREAM_TIMEOUT", "The upstream did not answer in time", http.StatusGatewayTimeout, codes.DeadlineExceeded}
	// The listener, or every upstream that could be asked, has as much under way as it may.
	ListenerFull = &Failure{"LISTENER_FULL", "The sidecar has as much under way as it may", http.StatusServiceUnavailable, codes.ResourceExhausted}
	UpstreamFull = &Failure{"UPSTREAM_FULL", "Every upstream has as much under way as it may", http.StatusServiceUnavailable, codes.ResourceExhausted}
)

// Failures are all of them.
var Failures = []*Failure{Malformed, Unreachable, Broken, Late, ListenerFull, UpstreamFull}

// ErrListenerFull is why a request is turned away when Begin says so.
var ErrListenerFull = errors.New("the listener has as many requests under way as max_requests")

// ErrUpstreamFull is for a request that no upstream may take at the moment, and for a
// connection too many.
var ErrUpstreamFull = errors.New("the upstream has as much under way as it may")

// Unconnected is the failure of a request that no upstream has taken because of err.
func Unconnected(err error) *Failure {
	if errors.Is(err, ErrUpstreamFull) {
		return UpstreamFull
	}
	return Unreachable
}

// problemType is the type of the problem document (RFC 9457) that tells of a failure.
const problemType = "https://merlon.dev/problems/sidecar"

type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Reason string `json:"reason"`
	Detail string `json:"detail,omitempty"`
}

// detail is what a caller is told of why: callers from elsewhere nothing about the
// inside of this machine, which the access log has.
func (h *Hop) detail(why error) string {
	if h.Direction == Outbound {
		return why.Error()
	}
	return ""
}

// Problem is the answer over HTTP.
func (h *Hop) Problem(f *Failure, why error) denial.Answer {
	body, err := json.Marshal(problem{problemType, f.Title, f.Status, f.Reason, h.detail(why)})
	if err != nil {
		body = nil // not reached: strings and a number
	}
	return denial.Answer{
		Status: f.Status, Body: string(body) + "\n",
		Fields: []policy.HeaderField{
			{Name: "cache-control", Value: "no-store"},
			{Name: "x-content-type-options", Value: "nosniff"},
			{Name: "content-type", Value: denial.ProblemContentType},
		},
	}
}

// GRPC is the status of a call: the reason is in its google.rpc.ErrorInfo, too.
func (h *Hop) GRPC(f *Failure, why error) *status.Status {
	text := f.Title + " (" + f.Reason + ")"
	if detail := h.detail(why); detail != "" {
		text += ": " + detail
	}
	st := status.New(f.Code, text)
	detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: f.Reason, Domain: denial.Domain})
	if err != nil {
		return st // not reached: ErrorInfo always marshals
	}
	return detailed
}

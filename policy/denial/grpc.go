// The same denial over gRPC, there and back.

package denial

import (
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
)

// Domain is the domain of the google.rpc.ErrorInfo that Merlon puts into gRPC
// errors.
const Domain = "merlon.dev"

// Error is what the caller of a denied call gets, over HTTP as over
// gRPC. Use errors.As to find it.
type Error struct {
	Reason policy.Reason
	// DecisionID names the decision in the logs of the called side and for
	// merlon explain decision.
	DecisionID string
	// Hint is what to do next, for a human.
	Hint string
	// Status is the HTTP status that the policy gave the denial; 0 for 403. Message
	// is what it tells the caller. Both come over gRPC only: over HTTP such a denial
	// is an answer.
	Status  int
	Message string
}

// Error implements error. What came from the other side is quoted.
func (e *Error) Error() string {
	msg := fmt.Sprintf("denied: %s (decision %s)", printable(string(e.Reason)), printable(e.DecisionID))
	if e.Message != "" {
		msg += ": " + printable(e.Message)
	}
	if e.Hint != "" {
		msg += "; hint: " + printable(e.Hint)
	}
	return msg
}

// printable keeps plain text as it is and quotes anything that could forge a
// log line or colour a terminal (SECURITY.md T36).
func printable(s string) string {
	if quoted := fmt.Sprintf("%+q", s); quoted != `"`+s+`"` {
		return quoted
	}
	return s
}

// GRPCStatus is the denial as gRPC carries it: PermissionDenied, or what the
// policy's HTTP status is in gRPC, with a google.rpc.ErrorInfo.
func (e *Error) GRPCStatus() *status.Status {
	st := status.New(codeOf(e.Status), e.Error())
	about := map[string]string{"decision_id": e.DecisionID, "hint": e.Hint}
	if e.Status != 0 {
		about["http_status"] = strconv.Itoa(e.Status)
	}
	if e.Message != "" {
		about["message"] = e.Message
	}
	detailed, err := st.WithDetails(&errdetails.ErrorInfo{Reason: string(e.Reason), Domain: Domain, Metadata: about})
	if err != nil {
		return st // not reached: ErrorInfo always marshals
	}
	return detailed
}

// By is the error that tells the caller of the denial d.
func By(d policy.Decision) *Error {
	e := &Error{Reason: d.Reason, DecisionID: d.DecisionID.String(), Hint: d.Hint()}
	if d.Response != nil && !d.Allow {
		e.Status, e.Message = d.Response.Status, truncated(d.Response.Body)
	}
	return e
}

// maxMessage bounds a policy's message to the caller over gRPC, where it travels in
// a header.
const maxMessage = 1 << 10

func truncated(s string) string {
	if len(s) > maxMessage {
		return strings.ToValidUTF8(s[:maxMessage], "")
	}
	return s
}

// codeOf is the code that google.rpc.Code gives as that of an HTTP status. What is no
// error in HTTP, a redirect above all, is a denial here.
func codeOf(httpStatus int) codes.Code {
	switch httpStatus {
	case 400:
		return codes.InvalidArgument
	case 401:
		return codes.Unauthenticated
	case 404:
		return codes.NotFound
	case 429:
		return codes.ResourceExhausted
	case 500:
		return codes.Internal
	case 501:
		return codes.Unimplemented
	case 502, 503:
		return codes.Unavailable
	case 504:
		return codes.DeadlineExceeded
	}
	return codes.PermissionDenied
}

// FromStatus finds a Merlon denial in a gRPC error.
func FromStatus(err error) (*Error, bool) {
	st, ok := status.FromError(err)
	if !ok {
		return nil, false
	}
	info, ok := Info(st)
	if !ok || info.GetMetadata()["decision_id"] == "" {
		return nil, false
	}
	httpStatus, err := strconv.Atoi(info.GetMetadata()["http_status"])
	if err != nil {
		httpStatus = 0
	}
	if st.Code() != codeOf(httpStatus) {
		return nil, false
	}
	return &Error{
		Reason:     policy.Reason(info.GetReason()),
		DecisionID: info.GetMetadata()["decision_id"],
		Hint:       info.GetMetadata()["hint"],
		Status:     httpStatus,
		Message:    info.GetMetadata()["message"],
	}, true
}

// Info finds Merlon's google.rpc.ErrorInfo in a gRPC status.
func Info(st *status.Status) (*errdetails.ErrorInfo, bool) {
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == Domain {
			return info, true
		}
	}
	return nil, false
}

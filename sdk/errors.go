// The two errors that programs look into: not ready yet, and denied.

package sdk

import (
	"fmt"

	"merlon.dev/policy"
	"merlon.dev/policy/denial"
)

// NotReadyReason says in one word why Open could not get an identity. The
// words are part of the contract with programs.
type NotReadyReason string

// The reasons of a NotReadyError.
const (
	BadAddress       NotReadyReason = "BAD_ADDRESS"       // the agent's address breaks the rules
	BadOption        NotReadyReason = "BAD_OPTION"        // what Open was told contradicts itself
	SocketAbsent     NotReadyReason = "SOCKET_ABSENT"     // there is no socket at the address
	SocketDead       NotReadyReason = "SOCKET_DEAD"       // nobody listens on the socket
	SocketForbidden  NotReadyReason = "SOCKET_FORBIDDEN"  // this process may not connect to it
	AgentNotTrusted  NotReadyReason = "AGENT_NOT_TRUSTED" // a user we do not trust serves the socket
	NoMatchingEntry  NotReadyReason = "NO_MATCHING_ENTRY" // no registration entry matches this process
	AgentNotSynced   NotReadyReason = "AGENT_NOT_SYNCED"  // the agent has not reached the CA yet
	BadAnswer        NotReadyReason = "BAD_ANSWER"        // what the agent sent proves no identity
	AgentUnavailable NotReadyReason = "AGENT_UNAVAILABLE" // any other trouble with the agent
)

// NotReadyError says why there is no identity.
type NotReadyError struct {
	Reason NotReadyReason
	// Hint is what to do about it, for a human.
	Hint string
	// Err is the cause as it was met.
	Err error
}

// Error implements error.
func (e *NotReadyError) Error() string {
	return fmt.Sprintf("no identity from the agent: %s: %v (hint: %s)", e.Reason, e.Err, e.Hint)
}

// Unwrap gives the cause.
func (e *NotReadyError) Unwrap() error { return e.Err }

// Domain is the domain of the google.rpc.ErrorInfo that Merlon puts into gRPC
// errors.
const Domain = denial.Domain

// DeniedError is what the caller of a denied call gets, over HTTP as over
// gRPC. Use errors.As to find it.
type DeniedError = denial.Error

// DeniedBy is the error that tells the caller of a denial.
func DeniedBy(d policy.Decision) *DeniedError { return denial.By(d) }

// DeniedFromStatus finds a Merlon denial in a gRPC error.
func DeniedFromStatus(err error) (*DeniedError, bool) { return denial.FromStatus(err) }

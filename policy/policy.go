// Package policy holds the words that every plane shares about authorization:
// what a call is (Input), what was decided (Decision, Reason) and who decides
// (Authorizer). It imports neither OPA nor anything else of Merlon, so that
// programs which only enforce stay small.
package policy

import "context"

// Protocol is how a call arrived. The enforcement point sets it; it is never
// derived from what the caller sends.
type Protocol string

// The protocols that grants can name. The zero value matches no grant.
const (
	HTTP Protocol = "http"
	GRPC Protocol = "grpc"
	TCP  Protocol = "tcp"
)

// Input is one call as the place where it arrives sees it. Source and
// Destination come from verified X509-SVIDs, never from headers.
type Input struct {
	// Source and Destination are SPIFFE IDs: caller and callee.
	Source, Destination string
	Protocol            Protocol
	// Method is the HTTP method, case-sensitive; "POST" for gRPC.
	Method string
	// Path holds the exact bytes of the path that is served or forwarded,
	// without the query; for gRPC "/package.Service/Method".
	Path string
	// Query is the raw query, without "?".
	Query string
	Host  string
	// Headers are the header fields; nil for none. See Header and HeaderMap.
	Headers Headers
	// JWT are the claims of a JWT-SVID that came with the call, verified for the
	// destination; nil for none. Who verifies it: see engine.ReadsJWT.
	JWT map[string]any
	// SourceAddress and DestinationAddress are "ip:port" where known.
	SourceAddress, DestinationAddress string
	// SourceSerial is the serial number of the peer's X509-SVID in lower-case
	// hex. It is recorded, and no policy reads it.
	SourceSerial string
}

// Reason says in one word why a decision came out as it did.
type Reason string

// The reasons. They are part of the contract with scripts: new ones may be
// added, none changes its meaning.
const (
	Allowed          Reason = "ALLOWED"           // a grant or Rego rule allows the call
	DenyRule         Reason = "DENY_RULE"         // a deny grant or Rego deny matched; deny wins
	NoGrant          Reason = "NO_GRANT"          // nothing names this source and destination
	MethodNotGranted Reason = "METHOD"            // a grant matched all but the method
	PathNotGranted   Reason = "PATH"              // a grant matched source and destination only
	NoIdentity       Reason = "NO_IDENTITY"       // the caller proved no SPIFFE ID
	Revoked          Reason = "REVOKED"           // the caller's SVID is revoked
	Expired          Reason = "EXPIRED"           // the caller's SVID has expired
	NoBundle         Reason = "NO_BUNDLE"         // no policy bundle is active
	StalePolicy      Reason = "STALE_POLICY"      // the policy bundle is older than allowed
	StaleRevocations Reason = "STALE_REVOCATIONS" // the revocation feed has been silent too long
	AgentUnavailable Reason = "AGENT_UNAVAILABLE" // the node's agent cannot be asked
	BadRequest       Reason = "BAD_REQUEST"       // the call is ambiguous, e.g. its path
	Error            Reason = "ERROR"             // evaluation failed
)

// Reasons lists every reason.
func Reasons() []Reason {
	return []Reason{
		Allowed, DenyRule, NoGrant, MethodNotGranted, PathNotGranted, NoIdentity, Revoked, Expired, NoBundle,
		StalePolicy, StaleRevocations, AgentUnavailable, BadRequest, Error,
	}
}

// Auditable says whether audit mode lets a call through that is denied for r: what a
// policy says, or cannot say, of a caller that has proved who it is. Revoked and expired
// callers and ambiguous requests are none of that.
func (r Reason) Auditable() bool {
	switch r {
	case DenyRule, NoGrant, MethodNotGranted, PathNotGranted, NoBundle, StalePolicy, AgentUnavailable, Error:
		return true
	}
	return false
}

// Decision is the result of one evaluation. The zero value denies.
type Decision struct {
	Allow bool
	// LetThrough says of a denial that the called service is in audit mode and lets
	// the call through in spite of it. It is recorded, and decides nothing.
	LetThrough bool
	Reason     Reason
	// RuleID is the grant (or "rego:allow", "rego:deny") that decided; empty
	// when nothing matched.
	RuleID string
	// DecisionID names this one decision in logs, errors and `merlon explain
	// decision`.
	DecisionID DecisionID
	// Revision is the generation of the policy bundle that decided; 0 for none.
	Revision uint64
	// Response is what the policy wants sent with the decision; nil for nothing. It
	// is shared, and must not be changed.
	Response *Response
	// DryRun has the IDs of the dry-run grants that match and, enforced, would have
	// decided otherwise, sorted. It is recorded, and decides nothing.
	DryRun []string
}

// Deny is a denial for reason r with a fresh decision ID.
func Deny(r Reason) Decision {
	return Decision{Reason: r, DecisionID: NewDecisionID()}
}

// Differing are those of the matching dry-run grants, by their effect, that would
// have changed a decision for reason, had all of them been enforced: deny wins.
func Differing(reason Reason, allows, denies []string) []string {
	switch reason {
	case Allowed:
		return denies
	case NoGrant, MethodNotGranted, PathNotGranted:
		if len(denies) == 0 {
			return allows
		}
	}
	return nil
}

// Hint says in a few words what the reader of a denial can do next.
func (d Decision) Hint() string {
	switch d.Reason {
	case Allowed:
		return ""
	case NoBundle:
		return "no policy is active: merlon policy push FOLDER"
	case AgentUnavailable:
		return "the Merlon agent of the called service does not answer: look at its log"
	case StalePolicy, StaleRevocations:
		return "the Merlon agent of the called service has not heard from the CA for too long: look at its log and /ready"
	case BadRequest:
		return "the path is ambiguous or the request malformed: send it without encoded or empty segments"
	case Expired, Revoked, NoIdentity:
		return "merlon explain identity --pid PID, on the caller's node"
	default:
		return "merlon explain decision " + d.DecisionID.String()
	}
}

// Authorizer answers whether calls may happen. Implementations are safe for
// concurrent use and fail closed: whatever goes wrong is a denial with a
// reason, never an error.
type Authorizer interface {
	Authorize(ctx context.Context, in *Input) Decision
}

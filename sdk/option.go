// What Open can be told.

package sdk

import (
	"cmp"
	"log/slog"
	"slices"
	"time"

	"merlon.dev/sdk/internal/option"
)

// Option changes how Open works.
type Option func(*options)

// options can be filled by sdktest, too.
type options = option.Set

const defaultStartupTimeout = 10 * time.Second

// WithAgentAddress names the agent's socket, "unix:///path", in place of the
// environment variable SPIFFE_ENDPOINT_SOCKET.
func WithAgentAddress(address string) Option {
	return func(o *options) { o.Address = address }
}

// WithAgentUID also trusts a socket that this user serves. Without it the
// agent has to run as root or as this process's own user (SECURITY.md T49).
func WithAgentUID(uid uint32) Option {
	return func(o *options) { o.UIDs = append(slices.Clip(o.UIDs), uid) }
}

// WithStartupTimeout is how long Open waits for an identity; 10 s without it.
func WithStartupTimeout(d time.Duration) Option {
	return func(o *options) { o.StartupTimeout = d }
}

// WithoutWaiting has Open return at once, before there is an identity, for programs
// that start in any order with their agent, or have other things to do meanwhile. Until
// the identity has come every handshake fails, at either end, and so every call;
// [Identity.Ready] waits for it and says what is in the way.
func WithoutWaiting() Option {
	return func(o *options) { o.WithoutWaiting = true }
}

// WithLogger is where the SDK reports: the loss and return of the agent,
// rotations, denials, cut connections. Without it, or where it is nil, slog's
// default handler is used.
func WithLogger(logger *slog.Logger) Option {
	return func(o *options) { o.Log = cmp.Or(logger, slog.Default()) }
}

// WithAuditUntil is for the adoption of a policy by a service that is in use
// already: until end, which lies at most a year ahead, calls to this service are
// decided, and those that the policy denies, or about which there is no policy, are
// logged, counted in [Identity.Stats] and let through. Every caller still has to
// prove its SPIFFE ID, revoked and expired callers and ambiguous requests are still
// refused, and decisions are recorded as they were made. At the end the policy is
// enforced, on calls under way too, without a restart.
//
// Handlers see by [Audited] that a call would be denied.
func WithAuditUntil(end time.Time) Option {
	return func(o *options) { o.AuditUntil = &end }
}

// WithPlaintextUntil also accepts callers that do not speak TLS yet, on the same
// port, until end, which is not after that of [WithAuditUntil]: they have no
// identity, NO_IDENTITY is what is decided of their calls, and audit mode lets them
// through. [Identity.Stats] and the log name them by address. Whoever can reach
// the port can call until then, and whoever is between can read and change
// what is said. A client that begins with TLS is held to it.
//
// The service listens by [Identity.ServerListener] (HTTP) or [Identity.Listener];
// grpcauth.ServerOptions need nothing more. Protocols in which the server speaks
// first cannot be told apart from silence.
func WithPlaintextUntil(end time.Time) Option {
	return func(o *options) { o.PlaintextUntil = &end }
}

// WithSourceInMetrics has the metric merlon.decisions and the spans of this service
// name the caller's SPIFFE ID, as merlon.source. Without it no SPIFFE ID is in either:
// each ID makes a time series of its own, and whoever reads traces learns who calls
// whom.
func WithSourceInMetrics() Option {
	return func(o *options) { o.TellSource = true }
}

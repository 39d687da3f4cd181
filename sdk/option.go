// What Open can be told.

package sdk

import (
	"log/slog"
	"slices"
	"time"
)

// Option changes how Open works.
type Option func(*options)

type options struct {
	address        string
	uids           []uint32
	startupTimeout time.Duration
	log            *slog.Logger
}

const defaultStartupTimeout = 10 * time.Second

// WithAgentAddress names the agent's socket, "unix:///path", in place of the
// environment variable SPIFFE_ENDPOINT_SOCKET.
func WithAgentAddress(address string) Option {
	return func(o *options) { o.address = address }
}

// WithAgentUID also trusts a socket that this user serves. Without it the
// agent has to run as root or as this process's own user (SECURITY.md T49).
func WithAgentUID(uid uint32) Option {
	return func(o *options) { o.uids = append(slices.Clip(o.uids), uid) }
}

// WithStartupTimeout is how long Open waits for an identity; 10 s without it.
func WithStartupTimeout(d time.Duration) Option {
	return func(o *options) { o.startupTimeout = d }
}

// WithLogger is where the SDK reports: the loss and return of the agent,
// rotations, denials, cut connections. Without it slog's default handler is
// used.
func WithLogger(logger *slog.Logger) Option {
	return func(o *options) { o.log = logger }
}

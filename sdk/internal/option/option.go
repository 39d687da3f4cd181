// Package option is what sdk.Open is told: by the options that package sdk has
// for everybody, and by those that package sdktest alone can make.
package option

import (
	"context"
	"log/slog"
	"net"
	"time"
)

// Set is what the options of one call of sdk.Open say.
type Set struct {
	Address        string
	UIDs           []uint32
	StartupTimeout time.Duration
	WithoutWaiting bool // StartupTimeout does not matter
	Log            *slog.Logger
	AuditUntil     *time.Time
	PlaintextUntil *time.Time
	TellSource     bool

	// Agent connects to the agent in the place of the socket at Address. Whoever
	// sets it answers for what is at the other end.
	Agent func(context.Context) (net.Conn, error)
	// Dial connects to peers, below TLS, in the place of the net package.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

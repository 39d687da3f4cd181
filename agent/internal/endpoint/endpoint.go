// Package endpoint holds what is true of every call on the agent's public
// socket, whichever service it is for: the caller is a process of this node
// that the kernel names, the security header is there, no user takes more than
// a share, and errors say in one word what is wrong.
package endpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/workload"
	"merlon.dev/sdk/unixsock"
)

// Reasons in the google.rpc.ErrorInfo of errors.
const (
	NoMatchingEntry = "NO_MATCHING_ENTRY"      // no registration entry is for this process
	NotSynced       = "AGENT_NOT_SYNCED"       // the agent does not know yet, or not any more
	CAUnavailable   = "CA_UNAVAILABLE"         // what is held does not do, and the CA did not answer
	Incomplete      = "ATTESTATION_INCOMPLETE" // the kubelet does not say what the caller is
	ProcessGone     = "PROCESS_GONE"           // the caller ended
	ForeignProcess  = "FOREIGN_PID_NAMESPACE"  // the caller has no process ID where the agent is
	ProcessChanged  = "PROCESS_CHANGED"        // the caller is not what it was when it connected
	TooManyStreams  = "TOO_MANY_STREAMS"       // the caller's user has its share
	RateLimited     = "RATE_LIMITED"           // the caller's user asks for more than his share
	SlowReader      = "SLOW_READER"            // the caller does not read what he asked for
	NotEntitled     = "NOT_ENTITLED"           // the caller asked for another identity
	ByWorkload      = "KEY_DELIVERY_WORKLOAD"  // the caller's entries let its key stay with it
	ByAgent         = "KEY_DELIVERY_AGENT"     // the caller's entries let the agent make its keys
)

// syncWait is how long a unary call is held while the agent is not in sync
// with the CA. Streams are held without end.
const syncWait = 10 * time.Second

// Callers finds out who calls and what he may have.
type Callers struct {
	Attestor *workload.Attestor
	Cache    *cache.Cache
}

// Attest proves who makes the call of ctx. It is cheap enough to be done
// before every answer, which is what makes exec, setuid and reuse of process
// IDs harmless. Errors are gRPC statuses.
func (c *Callers) Attest(ctx context.Context) (*workload.Process, error) {
	peer, ok := unixsock.PeerFromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "the connection does not say who calls")
	}
	p, err := c.Attestor.Attest(ctx, peer, c.Cache.Wants())
	switch {
	case err == nil:
		return p, nil
	case errors.Is(err, workload.ErrChanged):
		return nil, Changed()
	case errors.Is(err, workload.ErrForeign):
		return nil, Error(codes.Unavailable, ForeignProcess, err.Error(), "run merlon-agent in the PID namespace of the node (hostPID: true)")
	case errors.Is(err, workload.ErrGone):
		return nil, Error(codes.Unavailable, ProcessGone, err.Error(), "")
	case ctx.Err() != nil:
		return nil, status.FromContextError(ctx.Err()).Err()
	default:
		return nil, status.Error(codes.Unavailable, "the calling process could not be looked at")
	}
}

// Alive is the last look before an answer: nil while the process that
// connected still runs.
func (c *Callers) Alive(ctx context.Context) error {
	if peer, ok := unixsock.PeerFromContext(ctx); !ok || !peer.Alive() {
		return Error(codes.Unavailable, ProcessGone, workload.ErrGone.Error(), "")
	}
	return nil
}

// Entitled returns the caller and his entries, at least one. It waits a while
// for the agent to be in sync with the CA before it gives up, as long as none
// match: only in sync can the agent say that there are none.
func (c *Callers) Entitled(ctx context.Context) (*workload.Process, []*cache.Entry, error) {
	// Most calls end here, without a subscription.
	p, err := c.Attest(ctx)
	if err != nil {
		return nil, nil, err
	}
	entries, current := c.Cache.Entitled(p.Proof())
	if len(entries) > 0 {
		return p, entries, nil
	}
	if current {
		return nil, nil, NoEntry(p.PID)
	}
	return c.awaitEntitled(ctx)
}

func (c *Callers) awaitEntitled(ctx context.Context) (*workload.Process, []*cache.Entry, error) {
	sub := c.Cache.Subscribe()
	defer sub.Close()
	patience := time.NewTimer(syncWait)
	defer patience.Stop()
	for {
		p, err := c.Attest(ctx)
		if err != nil {
			return nil, nil, err
		}
		view := sub.View(p.Proof(), false)
		if len(view.Entries) > 0 {
			return p, view.Entries, nil
		}
		if view.Current {
			return nil, nil, NoEntry(p.PID)
		}
		select {
		case <-sub.Woken():
		case <-patience.C:
			return nil, nil, c.cannotTell()
		case <-ctx.Done():
			return nil, nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// NoEntry says that no registration entry is for the process.
func NoEntry(pid int32) error {
	return Error(codes.PermissionDenied, NoMatchingEntry, "no registration entry matches this process",
		fmt.Sprintf("merlon explain identity --pid %d", pid))
}

// KeyWithheld says that no key is handed out for the caller's identities. It is
// PERMISSION_DENIED as the standard has it: by this call he gets none.
func KeyWithheld() error {
	return Error(codes.PermissionDenied, ByWorkload, "the registration entries of this process let no key be handed out",
		"hold the key yourself and send a CSR (merlon.agent.v1.Local/HoldKeys), as sdk.Open does")
}

// KeysByAgent says that the caller may hold no key itself.
func KeysByAgent() error {
	return Error(codes.PermissionDenied, ByAgent, "no registration entry of this process lets it hold its own key",
		"use the Workload API; or merlon entry create --key-delivery workload")
}

// NotAmong says that the caller asked for another identity than his. While
// changes from the CA do not arrive it may well be his: then the agent cannot
// tell.
func (c *Callers) NotAmong(message string) error {
	if s := c.Cache.State(); !s.Synced || !s.Connected {
		return Unsynced()
	}
	return Error(codes.PermissionDenied, NotEntitled, message, "")
}

// Unsynced says that the agent cannot tell.
func Unsynced() error {
	return Error(codes.Unavailable, NotSynced, "the agent is not in sync with the CA", "look at the agent's log and at its /ready")
}

// cannotTell says why it is not certain that there is no entry.
func (c *Callers) cannotTell() error {
	if s := c.Cache.State(); s.Synced && s.Connected && !s.Stale {
		return Error(codes.Unavailable, Incomplete, "the kubelet does not say which pod the calling process is in", "look at the agent's log")
	}
	return Unsynced()
}

// Changed says that the caller is not what it was and has to connect again.
func Changed() error {
	return Error(codes.Unavailable, ProcessChanged, "the calling process runs another program or as another user than when it connected",
		"connect again")
}

// Error is a gRPC status with an ErrorInfo that programs can read.
func Error(code codes.Code, reason, message, hint string) error {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: "merlon.dev"}
	if hint != "" {
		message += "; hint: " + hint
		info.Metadata = map[string]string{"hint": hint}
	}
	st := status.New(code, message)
	if with, err := st.WithDetails(info); err == nil {
		st = with
	}
	return st.Err()
}

// Admins lets only root, the agent's own user and uids call.
func Admins(uids []uint32) (grpc.UnaryServerInterceptor, grpc.StreamServerInterceptor) {
	allowed := append([]uint32{0, uint32(os.Geteuid())}, uids...)
	check := func(ctx context.Context) error {
		peer, ok := unixsock.PeerFromContext(ctx)
		if !ok || !slices.Contains(allowed, peer.UID) {
			return status.Error(codes.PermissionDenied, "only root, the agent's user and admin_uids may use the admin socket")
		}
		return nil
	}
	unary := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if err := check(ctx); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
	stream := func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		if err := check(stream.Context()); err != nil {
			return err
		}
		return next(srv, stream)
	}
	return unary, stream
}

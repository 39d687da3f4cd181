// Slow readers: how long a stream waits for one.

package endpoint

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/unixsock"
)

// Patience is how long a message may wait for a reader that takes nothing. What
// was sent before fills 64 KiB then, and the CA may be waiting for this stream to
// know a new trust bundle.
const Patience = 30 * time.Second

// Deliver calls send, which sends a message on the stream of ctx. A reader that
// takes nothing for too long loses his connection, because what is buffered for a
// stream stays until then.
func Deliver(ctx context.Context, patience time.Duration, send func() error) error {
	peer, ok := unixsock.PeerFromContext(ctx)
	if !ok {
		return status.Error(codes.Internal, "the connection does not say who calls")
	}
	slow := time.AfterFunc(patience, peer.Hangup) // which ends send
	err := send()
	if !slow.Stop() {
		return Error(codes.Unavailable, SlowReader, "the caller reads nothing", "read what the stream sends, and connect again")
	}
	return err
}

// Calls that the replica which is followed cannot answer yet, and another can: a
// replica that has just joined signs no JWT-SVIDs until every agent knows its key.

package caclient

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

// elsewhereTimeout bounds a call to one other replica, with its connection.
const elsewhereTimeout = 4 * time.Second

// asksForAnother says whether the replica that answered err sends to another.
func asksForAnother(err error) bool {
	for _, detail := range status.Convert(err).Details() {
		if _, ok := detail.(*capb.AskAnotherReplica); ok {
			return true
		}
	}
	return false
}

// anywhere is links.call, and where the replica that is followed sends to another,
// f on those, one after the other. If none of them can do it either, what the
// first one said is the answer.
func (c *Client) anywhere(ctx context.Context, f func(context.Context, capb.NodeClient) error) error {
	err := c.links.call(ctx, f)
	if !asksForAnother(err) {
		return err
	}
	followed := c.links.current()
	if followed == nil {
		return err
	}
	for _, i := range rand.Perm(len(c.cfg.Addresses)) { //nolint:gosec // spreads load
		if address := c.cfg.Addresses[i]; address != followed.address && followed.tryAt(ctx, address, f) == nil {
			return nil
		}
	}
	return err
}

// tryAt runs f on a connection of its own to another replica.
func (l *link) tryAt(ctx context.Context, address string, f func(context.Context, capb.NodeClient) error) error {
	ctx, cancel := context.WithTimeout(ctx, elsewhereTimeout)
	defer cancel()
	cc, err := l.dial(address)
	if err != nil {
		return err
	}
	defer cc.Close()
	return f(ctx, capb.NewNodeClient(cc))
}

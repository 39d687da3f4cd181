// Refusals: what the CA says to an agent that it does not want, and what the
// agent makes of it. An eviction and the like ask the node to prove itself anew;
// by a ban it gives up what was issued through it, and says so.

package caclient

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// statusOf is the status in err as it came, without what err was wrapped in,
// which status.FromError would add to its text; nil for none.
func statusOf(err error) *status.Status {
	if s, ok := errors.AsType[interface {
		error
		GRPCStatus() *status.Status
	}](err); ok {
		return s.GRPCStatus()
	}
	return nil
}

// whyRefused is the CA's reason to refuse this agent; unspecified for any other
// error.
func whyRefused(err error) capb.Refusal {
	for _, d := range statusOf(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == "merlon.dev" {
			return capb.Refusal(capb.Refusal_value["REFUSAL_"+info.GetReason()])
		}
	}
	return capb.Refusal_REFUSAL_UNSPECIFIED
}

// asRefusal returns why the CA refuses this agent, or why they do not agree about
// the past, in the words of who refused; nil if err is something else.
func asRefusal(err error) error {
	if older, ok := errors.AsType[*cache.OlderError](err); ok {
		return older
	}
	if s := statusOf(err); s.Code() == codes.FailedPrecondition || whyRefused(err) != capb.Refusal_REFUSAL_UNSPECIFIED {
		return errors.New(s.Message())
	}
	return nil
}

// prove sees to an SVID that the CA at address may take. Where the CA refused the
// one that is held the node attests anew; refused says why that failed, and the
// SVID is shown again all the same: what was decided about it may not hold any
// more.
func (c *Client) prove(ctx context.Context, picture *cache.Cache, address string) (refused, err error) {
	own := c.own.Load()
	if own == nil || !own.valid(time.Now()) {
		return nil, c.attest(ctx, picture, address)
	}
	if own.refused == nil {
		return nil, nil
	}
	return c.attest(ctx, picture, address), nil
}

// heed remembers that the CA asks the node to attest anew; nil is for a CA that
// takes the SVID.
func (c *Client) heed(err error) {
	own := c.own.Load()
	if own == nil {
		return
	}
	var refused error
	switch whyRefused(err) {
	case capb.Refusal_REFUSAL_AGENT_EVICTED, capb.Refusal_REFUSAL_SVID_REVOKED, capb.Refusal_REFUSAL_AGENT_UNKNOWN:
		refused = fmt.Errorf("the node has to attest anew: %s", statusOf(err).Message())
	default:
		if err != nil || own.refused == nil {
			return
		}
	}
	changed := *own
	changed.refused = refused
	c.own.CompareAndSwap(own, &changed)
}

// heedBan gives up what was issued through this agent, where the CA has banned it.
func (c *Client) heedBan(ctx context.Context, picture *cache.Cache, err error) {
	own := c.own.Load()
	if own == nil || whyRefused(err) != capb.Refusal_REFUSAL_AGENT_BANNED {
		return
	}
	serial, _ := svid.SerialFromBig(own.Certificates[0].SerialNumber)
	picture.Ban(ctx, own.ID, serial.Agent)
}

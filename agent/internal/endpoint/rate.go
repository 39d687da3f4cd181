// Rates: no user of the node can have done without end what costs others, the CA
// or the agent (SECURITY.md T39).

package endpoint

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"

	"merlon.dev/sdk/unixsock"
)

// Rate bounds how often something is done for each user. It is safe for
// concurrent use.
type Rate struct {
	perSecond, burst int

	mu sync.Mutex
	// guarded by mu
	users map[uint32]*rate.Limiter
	sweep int // how many users make it worth to look for those at rest
}

// minSweep is how many users are remembered in any case.
const minSweep = 64

// NewRate allows each user so many a second, and burst at once after a rest.
func NewRate(perSecond, burst int) *Rate {
	return &Rate{perSecond: perSecond, burst: burst, users: map[uint32]*rate.Limiter{}, sweep: minSweep}
}

// Take takes one for uid, or says that he had his share.
func (r *Rate) Take(uid uint32) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	user := r.users[uid]
	if user == nil {
		r.forget()
		user = rate.NewLimiter(rate.Limit(r.perSecond), r.burst)
		r.users[uid] = user
	}
	return user.Allow()
}

// forget drops the users who have all of their burst again, now and then. r.mu
// is held.
func (r *Rate) forget() {
	if len(r.users) < r.sweep {
		return
	}
	for uid, user := range r.users {
		if user.Tokens() >= float64(r.burst) {
			delete(r.users, uid)
		}
	}
	r.sweep = max(minSweep, 2*len(r.users))
}

// Admit takes one for the caller of ctx, or says in an error what he had enough
// of.
func (r *Rate) Admit(ctx context.Context, what, hint string) error {
	peer, ok := unixsock.PeerFromContext(ctx)
	if !ok {
		return Error(codes.Internal, ProcessGone, "the connection does not say who calls", "")
	}
	if !r.Take(peer.UID) {
		return Error(codes.ResourceExhausted, RateLimited,
			fmt.Sprintf("uid %d had %d %s in a row, and gets %d a second now", peer.UID, r.burst, what, r.perSecond), hint)
	}
	return nil
}

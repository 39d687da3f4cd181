// Requests for JWT-SVIDs: one call to the CA at a time, and what is asked for
// while it is under way travels together in the next. A call costs the CA more
// than the signatures in it, so the busier an agent is, the less each one costs.

package cache

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
)

const (
	// maxJWTBatch is how many JWT-SVIDs one call asks for at most.
	maxJWTBatch = 100
	// jwtTimeout bounds one call.
	jwtTimeout = 5 * time.Second
)

// jwtQueue has no goroutine of its own: whoever comes to a queue that sends
// nothing sends, and then gives the turn to the first of those who came meanwhile.
// It is safe for concurrent use.
type jwtQueue struct {
	authority Authority

	mu sync.Mutex
	// guarded by mu
	sending bool // somebody has the turn
	waiting []*asked
}

// asked is one request in the queue.
type asked struct {
	item *capb.SignJWTItem
	// told says once what comes next for it; capacity 1. A turn is given with mu
	// held, while it is still waiting.
	told chan told
}

// told is an answer, or the turn to send.
type told struct {
	token string
	err   error
	turn  bool
}

// ask returns a JWT-SVID in compact serialization. Errors carry gRPC codes if they
// are the CA's.
func (q *jwtQueue) ask(ctx context.Context, item *capb.SignJWTItem) (string, error) {
	mine := &asked{item: item, told: make(chan told, 1)}
	q.enter(mine)
	for {
		select {
		case next := <-mine.told:
			if !next.turn {
				return next.token, next.err
			}
			q.send(ctx)
		case <-ctx.Done():
			q.leave(mine)
			return "", status.FromContextError(ctx.Err()).Err()
		}
	}
}

// enter waits, or has the turn at once.
func (q *jwtQueue) enter(a *asked) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting = append(q.waiting, a)
	if !q.sending {
		q.pass()
	}
}

// pass gives the turn to the first who waits. q.mu is held.
func (q *jwtQueue) pass() {
	if q.sending = len(q.waiting) > 0; q.sending {
		q.waiting[0].told <- told{turn: true}
	}
}

// leave is for who does not wait any longer.
func (q *jwtQueue) leave(a *asked) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.Index(q.waiting, a)
	if i < 0 {
		return // it is on its way, and nobody reads the answer
	}
	q.waiting = slices.Delete(q.waiting, i, i+1)
	select {
	case <-a.told: // nothing but the turn is told to who waits
		q.pass()
	default:
	}
}

// send asks the CA for what the first of the queue want, and answers them. Its
// caller is one of them; that he gives up does not concern the others.
func (q *jwtQueue) send(ctx context.Context) {
	q.mu.Lock()
	n := min(len(q.waiting), maxJWTBatch)
	batch := slices.Clone(q.waiting[:n])
	q.waiting = slices.Delete(q.waiting, 0, n)
	q.mu.Unlock()

	items := make([]*capb.SignJWTItem, n)
	for i, a := range batch {
		items[i] = a.item
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), jwtTimeout)
	defer cancel()
	results, err := q.authority.SignJWT(ctx, items)
	if err == nil && len(results) != n {
		err = fmt.Errorf("sign JWT: %d answers to %d requests", len(results), n)
	}
	for i, a := range batch {
		answer := told{err: err}
		if err == nil {
			answer = told{token: results[i].GetToken(), err: status.Error(codes.Code(results[i].GetCode()), results[i].GetMessage())}
		}
		a.told <- answer
	}

	q.mu.Lock()
	defer q.mu.Unlock()
	q.pass()
}

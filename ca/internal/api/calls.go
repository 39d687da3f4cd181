// How many calls a caller may have open: counted from a call's headers on,
// because one whose request never comes holds a goroutine all the same
// (SECURITY.md T38).

package api

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"merlon.dev/sdk/unixsock"
)

const (
	// maxCalls is what one caller may have open, over all connections; all who
	// show nothing count as one, and all who show a token. An agent needs a
	// handful.
	maxCalls = 1000
	// anonymousTimeout ends a call of somebody who shows nothing, tokenTimeout one
	// of somebody who shows what may be a token: a backup takes its time.
	anonymousTimeout = 30 * time.Second
	tokenTimeout     = 10 * time.Minute
)

// calls counts open calls. It is safe for concurrent use.
type calls struct {
	mu *sync.Mutex
	// guarded by mu
	open       map[string]int
	turnedAway map[string]int // since that was recorded; of those who have calls open
}

func newCalls() calls {
	return calls{mu: new(sync.Mutex), open: make(map[string]int), turnedAway: make(map[string]int)}
}

func (c calls) take(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[name] >= maxCalls {
		c.turnedAway[name]++
		return false
	}
	c.open[name]++
	return true
}

// give says how many calls there was no place for, once.
func (c calls) give(name string) (turnedAway int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[name]--; c.open[name] <= 0 {
		delete(c.open, name)
	}
	turnedAway = c.turnedAway[name]
	delete(c.turnedAway, name)
	return turnedAway
}

// tap lets a call begin, or not. It runs before anything else of it is read.
func (s *Service) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	name, known := connectionName(ctx)
	timeout := anonymousTimeout
	if _, shown := bearer(info.Header); shown && !known {
		name, timeout = "holders of tokens", tokenTimeout
	}
	if !s.calls.take(name) {
		s.metrics.refused.WithLabelValues(codes.ResourceExhausted.String()).Inc()
		return ctx, tooMany(name)
	}
	context.AfterFunc(ctx, func() { s.ended(ctx, name) }) // gRPC ends it with the call
	if known {
		return ctx, nil
	}
	bounded, cancel := context.WithTimeout(ctx, timeout)
	context.AfterFunc(bounded, cancel)
	return bounded, nil
}

// connectionName is who a connection belongs to, whatever that is worth now.
func connectionName(ctx context.Context) (name string, known bool) {
	if p, ok := peer.FromContext(ctx); ok {
		switch info := p.AuthInfo.(type) {
		case unixsock.AuthInfo:
			return "the admin socket", true
		case tlsInfo:
			if info.Peer != nil {
				return info.Peer.ID.String(), true
			}
		}
	}
	return Anonymous().Name, false
}

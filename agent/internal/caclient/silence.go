// Silence of the CA. With each message it says when the next one comes at the latest,
// sooner where it has few agents (ca/internal/api/pulse.go). When none has come the agent
// asks: a process that does not answer even then, and of which not a byte comes, hangs. Nobody pings while all is well,
// which is what ten thousand agents would cost the CA most; but an agent that may not
// hold old revocations for long asks as often as it has to.

package caclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

const (
	// untold is when the next message comes of a CA that does not say (Merlon before
	// next_within), and longestWord the latest that is believed.
	untold, longestWord = 15 * time.Second, time.Minute
	// A message that is overdue for so long is asked for, and something has to come in
	// answerWithin: the answer, or more of a message that is long on its way.
	overdue, answerWithin = time.Second, 5 * time.Second
	// grace is beyond two messages in a row that are missing: then the stream is left
	// whatever else comes.
	grace = 5 * time.Second
)

var (
	errSilent = errors.New("the CA has said nothing for too long")
	errHangs  = fmt.Errorf("the CA has not said what it was to say by now, and nothing comes within %v of asking: its process hangs", answerWithin)
)

// silence watches one stream. It is safe for concurrent use.
type silence struct {
	ask   func()
	reads *atomic.Uint64          // how often something came on the connection
	most  time.Duration           // to wait before it asks, whatever the CA says
	stop  context.CancelCauseFunc // of the stream

	mu sync.Mutex // guards what follows
	// heard counts what was heard, so that a timer that fires late means nothing.
	heard  int
	timers []*time.Timer
}

// expect begins to wait for the next message, which comes within the duration; zero:
// the CA does not say when.
func (s *silence) expect(within time.Duration) {
	told := within > 0
	if !told {
		within = untold
	}
	within = min(within, longestWord)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest()
	s.timers = append(s.timers, time.AfterFunc(2*max(within, untold)+grace, func() { s.stop(errSilent) }))
	if told {
		heard := s.heard
		s.timers = append(s.timers, time.AfterFunc(min(within+overdue, s.most), func() { s.wonder(heard) }))
	}
}

// wonder asks, unless more was heard since.
func (s *silence) wonder(heard int) {
	if s.listen(heard, s.reads.Load()) {
		s.ask()
	}
}

// listen gives the CA time for as long as something comes, and says whether more was to
// be heard.
func (s *silence) listen(heard int, reads uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.heard != heard {
		return false
	}
	s.timers = append(s.timers, time.AfterFunc(answerWithin, func() {
		if now := s.reads.Load(); now != reads {
			s.listen(heard, now)
		} else {
			s.stop(errHangs)
		}
	}))
	return true
}

// hear ends the wait: a message has come. What it takes to apply it is not the CA's
// silence.
func (s *silence) hear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rest()
}

// rest is for holders of s.mu.
func (s *silence) rest() {
	s.heard++
	for _, t := range s.timers {
		t.Stop()
	}
	s.timers = s.timers[:0]
}

// listening are credentials of connections that count what comes on them.
type listening struct {
	credentials.TransportCredentials
	reads *atomic.Uint64
}

// ClientHandshake implements credentials.TransportCredentials.
func (l listening) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := l.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, err
	}
	return listened{conn, l.reads}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (l listening) Clone() credentials.TransportCredentials {
	return listening{l.TransportCredentials.Clone(), l.reads}
}

type listened struct {
	net.Conn
	reads *atomic.Uint64
}

// Read implements net.Conn.
func (c listened) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.reads.Add(1)
	return n, err
}

// hearWithin is how often the CA has to be heard of so that nothing is too old, with room
// for an answer that does not come.
func (c *Client) hearWithin() time.Duration {
	most := 2 * longestWord
	for _, age := range []time.Duration{c.cfg.RevocationMaxAge, c.cfg.PolicyStaleAfter} {
		if age > 0 {
			most = min(most, age/3)
		}
	}
	return most
}

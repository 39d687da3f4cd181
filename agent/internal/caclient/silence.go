// Silence of the CA. With each message it says when the next one comes at the latest,
// sooner where it has few agents (ca/internal/api/pulse.go). When none has come the agent
// asks: a process that does not answer even then hangs. Nobody pings while all is well,
// which is what ten thousand agents would cost the CA most; but an agent that may not
// hold old revocations for long asks as often as it has to.

package caclient

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	// untold is when the next message comes of a CA that does not say (Merlon before
	// next_within), and longestWord the latest that is believed.
	untold, longestWord = 15 * time.Second, time.Minute
	// A message that is overdue for so long is asked for, and the answer has to come in
	// answerWithin.
	overdue, answerWithin = time.Second, 5 * time.Second
	// grace is beyond two messages in a row that are missing: then the stream is left also
	// if nobody could ask.
	grace = 5 * time.Second
)

var (
	errSilent = errors.New("the CA has said nothing for too long")
	errHangs  = fmt.Errorf("the CA has not said what it was to say by now, and does not answer within %v: its process hangs", answerWithin)
)

// silence watches one stream. It is safe for concurrent use.
type silence struct {
	ask  func()
	most time.Duration           // to wait before it asks, whatever the CA says
	stop context.CancelCauseFunc // of the stream

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
	s.timers = append(s.timers, time.AfterFunc(2*within+grace, func() { s.stop(errSilent) }))
	if told {
		heard := s.heard
		s.timers = append(s.timers, time.AfterFunc(min(within+overdue, s.most), func() { s.wonder(heard) }))
	}
}

// wonder asks, unless more was heard since.
func (s *silence) wonder(heard int) {
	s.mu.Lock()
	if s.heard != heard {
		s.mu.Unlock()
		return
	}
	s.timers = append(s.timers, time.AfterFunc(answerWithin, func() { s.stop(errHangs) }))
	s.mu.Unlock()
	s.ask()
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

// How far the node's clock is ahead of the CA's, at least, by what delay cannot fake. A
// message that says when it was sent has been on its way since, for nobody knows how
// long: by it the node is at most so far ahead. A lower bound takes a question: what
// answers it was sent after it, so that the node's clock is ahead by no less than what
// is left without the whole way there and back.

package caclient

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"math"
	"sync"
	"time"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/svid"
)

// clockAlarm is how far the CA's clock may be off before the log says so
// (SECURITY.md T41).
const clockAlarm = 30 * time.Second

// askPause keeps questions from following each other.
const askPause = 10 * time.Second

// unknown is the lower bound where there is none.
const unknown = time.Duration(math.MinInt64)

// clock is what one Sync stream shows of the CA's. It is safe for concurrent use.
type clock struct {
	mu sync.Mutex
	// guarded by mu
	wanted          bool   // another question is to be asked
	asked, answered uint64 // questions, counted from 1
	askedAt         time.Time
	atLeast         time.Duration // by the last answer
}

// newClock has the first message of a stream be a question.
func newClock() *clock { return &clock{wanted: true, atLeast: unknown} }

// ask returns the number of the question that goes out at now, 0 for none.
func (c *clock) ask(now time.Time) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.wanted {
		return 0
	}
	c.wanted = false
	c.asked, c.askedAt = c.asked+1, now
	return c.asked
}

// heard takes in a message, and says how far the node's clock is ahead of the CA's: of
// all that can be, what is nearest to nothing. ask is set where it may be off by more than
// it should, or that is all delay: an answer will tell.
func (c *clock) heard(sent time.Time, answers uint64, now time.Time) (ahead time.Duration, ask bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.asked == 1 {
		answers = max(answers, 1) // a CA that knows of no questions, too, speaks after it was spoken to
	}
	atMost := now.Sub(sent)
	switch {
	case answers == c.asked && answers > c.answered:
		c.answered = answers
		c.atLeast = atMost - now.Sub(c.askedAt)
	case atMost < c.atLeast: // one of the clocks was set
		c.atLeast = unknown
	}
	if atMost > clockAlarm && c.atLeast <= clockAlarm && c.answered == c.asked && now.Sub(c.askedAt) >= askPause {
		c.wanted, ask = true, true
	}
	return max(c.atLeast, min(atMost, 0)), ask
}

// want has another question asked.
func (c *clock) want() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wanted = true
}

// checkClock takes in when a message was sent.
func (s *stream) checkClock(ctx context.Context, m *capb.SyncResponse) {
	if m.GetSentAt() == nil {
		return
	}
	ahead, ask := s.clock.heard(m.GetSentAt().AsTime(), m.GetAnswers(), time.Now())
	s.noteClock(ctx, ahead)
	if ask {
		signal(s.ackAgain)
	}
}

// noteClock raises the alarm where the clocks have come apart.
func (c *Client) noteClock(ctx context.Context, ahead time.Duration, more ...slog.Attr) {
	before := c.clockAhead.Swap(&ahead)
	if ahead.Abs() > clockAlarm && (before == nil || before.Abs() <= clockAlarm) {
		c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "clocks of CA and node differ", append(more, slog.Duration("ahead", ahead))...)
	}
}

// timed is verify by the clock of now. Where time is all that is wrong with the CA's
// certificates it says so, with both times: what is refused in a handshake tells nobody
// why.
func (c *Client) timed(verify func(cs tls.ConnectionState, now time.Time) error) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		now := time.Now()
		err := verify(cs, now)
		if err == nil {
			c.endedSaid.Store(false)
			return nil
		}
		if refused, ok := errors.AsType[*svid.Error](err); ok && refused.Expired() {
			begin, end := validity(cs.PeerCertificates)
			c.mistimed(begin, end, now, func(at time.Time) bool { return verify(cs, at) == nil })
		}
		return err
	}
}

// mistimed says what certificates that are not valid at now tell of the clocks. Those
// that are still to come were signed by a clock that is ahead of this one; those that
// have ended may also be somebody's who has kept them.
func (c *Client) mistimed(begin, end, now time.Time, genuine func(time.Time) bool) {
	ctx := context.Background()
	switch {
	case now.Before(begin) && genuine(begin):
		c.noteClock(ctx, now.Sub(begin), slog.Time("node_clock", now), slog.Time("ca_certificate_not_before", begin))
	case now.After(end) && genuine(end) && !c.endedSaid.Swap(true):
		c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "the CA's certificate has ended by this node's clock: compare the clocks of both",
			slog.Time("node_clock", now), slog.Time("ca_certificate_not_after", end))
	}
}

// validity is when all of certs are valid.
func validity(certs []*x509.Certificate) (begin, end time.Time) {
	for i, cert := range certs {
		if i == 0 || cert.NotBefore.After(begin) {
			begin = cert.NotBefore
		}
		if i == 0 || cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	return begin, end
}

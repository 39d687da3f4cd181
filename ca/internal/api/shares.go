// How many refusals of whom are written down. A log that keeps so many days and
// bytes must not be at the mercy of those who are refused: whoever could fill it
// would wipe out what it says about him.

package api

import (
	"sync"

	"golang.org/x/time/rate"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Refusals are written down at most so often: of all who prove nothing, of all
// whose SVID gives them no right here, and of each agent. Beyond it only a metric
// counts them. Administrators are not counted: there are few, and each is known.
const (
	refusalsPerSecond = 20
	refusalsBurst     = 1000
)

// shares are those of the refused. It is safe for concurrent use.
type shares struct {
	nobody, powerless *rate.Limiter
	agents            sync.Map // spiffeid.ID → *rate.Limiter; as many as there are agents
}

func newShares() *shares { return &shares{nobody: newShare(), powerless: newShare()} }

func newShare() *rate.Limiter { return rate.NewLimiter(refusalsPerSecond, refusalsBurst) }

// record says whether one more refusal of c is written down.
func (s *shares) record(c *Caller) bool {
	switch {
	case c.Agent != nil:
		return s.of(c.Agent.ID).Allow()
	case len(c.Kinds) > 1:
		return true
	case c.Peer != nil:
		return s.powerless.Allow()
	default:
		return s.nobody.Allow()
	}
}

func (s *shares) of(agent spiffeid.ID) *rate.Limiter {
	if l, ok := s.agents.Load(agent); ok {
		return l.(*rate.Limiter)
	}
	l, _ := s.agents.LoadOrStore(agent, newShare())
	return l.(*rate.Limiter)
}

// writesDown says whether one more refusal of c is written down, and counts it if
// not.
func (s *Service) writesDown(c *Caller) bool {
	if s.shares.record(c) {
		return true
	}
	s.metrics.unrecorded.Inc()
	return false
}

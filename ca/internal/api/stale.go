// Whether the store can be reached. Without it this replica goes on from the
// picture that it has, refuses writes, and says so on every Sync stream at once,
// for agents that know another replica.

package api

import (
	"errors"
	"sync"
	"sync/atomic"
)

// errUnreachable is what callers get for store.ErrUnavailable.
var errUnreachable = errors.New("this CA cannot reach its store, so it changes nothing now; whether this change was made is not known: look before you repeat it, on another replica if there is one")

// reach says whether the store answers. It is safe for concurrent use.
type reach struct {
	turning sync.Mutex // held while one state follows another
	state   atomic.Pointer[reachState]
}

// reachState is immutable.
type reachState struct {
	stale  bool
	turned chan struct{} // closed when another state follows
}

func newReach() *reach {
	r := &reach{}
	r.state.Store(&reachState{turned: make(chan struct{})})
	return r
}

// SetStale says that the store cannot be reached, or again can.
func (s *Service) SetStale(stale bool) {
	s.reach.turning.Lock()
	defer s.reach.turning.Unlock()
	before := s.reach.state.Load()
	if before.stale == stale {
		return
	}
	s.reach.state.Store(&reachState{stale: stale, turned: make(chan struct{})})
	close(before.turned)
}

// Stale says whether the store cannot be reached, as far as is known.
func (s *Service) Stale() bool { return s.reach.state.Load().stale }

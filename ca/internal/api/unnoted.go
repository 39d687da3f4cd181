// Renewals that the store has not taken: an agent goes on although its record
// says that it has ended. Rotation counts agents by their records, so this replica
// remembers whom it renewed, and catches up before it is heard of again.

package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/entry"
)

// renewal is an agent's newest SVID, and the one that it replaced, if that is known.
type renewal struct{ shown, issued attest.SVID }

// unnoted is safe for concurrent use.
type unnoted struct {
	mu sync.Mutex
	// guarded by mu
	last map[spiffeid.ID]renewal

	more chan struct{} // holds a token since the last that was added
}

func newUnnoted() *unnoted {
	return &unnoted{last: make(map[spiffeid.ID]renewal), more: make(chan struct{}, 1)}
}

// add remembers that the agent was given the SVID issued for shown; without that,
// for the one before.
func (u *unnoted) add(id spiffeid.ID, shown, issued attest.SVID) {
	u.mu.Lock()
	if before := u.last[id].issued; issued.NotAfter.After(before.NotAfter) {
		u.last[id] = renewal{cmp.Or(shown, before), issued}
	}
	u.mu.Unlock()
	select {
	case u.more <- struct{}{}:
	default:
	}
}

// done forgets the agent, unless it was renewed again meanwhile.
func (u *unnoted) done(id spiffeid.ID, noted renewal) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last[id] == noted {
		delete(u.last, id)
	}
}

func (u *unnoted) all() map[spiffeid.ID]renewal {
	u.mu.Lock()
	defer u.mu.Unlock()
	return maps.Clone(u.last)
}

// Unnoted receives when there is a renewal that the store has not taken.
func (s *Service) Unnoted() <-chan struct{} { return s.unnoted.more }

// NoteRenewals writes down the renewals that the store has not taken yet. When it
// returns nil, the store knows of every agent that this replica has renewed.
func (s *Service) NoteRenewals(ctx context.Context) error {
	for id, r := range s.unnoted.all() {
		err := attest.CaughtUp(ctx, s.opts.Store, id, r.shown, r.issued)
		switch {
		case errors.Is(err, attest.ErrUnknownAgent), errors.Is(err, attest.ErrEvicted), errors.Is(err, attest.ErrBanned):
			// It does not count any more.
		case err != nil:
			return fmt.Errorf("note the renewals that the store has not taken: %w", err)
		}
		s.unnoted.done(id, r)
	}
	return nil
}

// rememberRenewal takes over from the audit log, oldest first, that an agent was
// given an SVID, where the store does not say so.
func (s *Service) rememberRenewal(id spiffeid.ID, issued attest.SVID) {
	if _, ok := entry.AgentName(id); !ok {
		return
	}
	if a, ok := s.registry.Agent(id); ok && issued.NotAfter.After(a.NotAfter) {
		s.unnoted.add(id, attest.SVID{}, issued)
	}
}

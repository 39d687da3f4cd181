// Noticing a rollback. A store that was put back to an earlier state, such as
// the snapshot of a virtual machine, is whole and cannot tell. Agents can: each
// says at the start of Sync what it has seen. Without this a CA would give out
// revisions twice, and revocations would concern the wrong SVIDs (SECURITY.md
// T43). A store that has gone on since is told by what it held when it was
// opened: under an earlier opening nobody can have seen more.

package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/store"
)

const (
	// catchUpTimeout is how long a replica may take to see what its store holds
	// already, before the agent tries another one.
	catchUpTimeout = 10 * time.Second
	// evidenceInterval is how often the log says it; the metric counts all.
	evidenceInterval = time.Minute
)

// evidenceLog bounds what an agent that lies can write to the log.
func evidenceLog() *rate.Sometimes { return &rate.Sometimes{First: 10, Interval: evidenceInterval} }

// Opening is how a CA that has its store alone found it.
type Opening struct {
	ID       string // of no other one
	Revision uint64 // before anything else was written
}

// contradicts says whether more was seen under an earlier opening than this one
// found.
func (o Opening) contradicts(seen *capb.Seen) bool {
	under := string(seen.GetOpening())
	return o.ID != "" && under != "" && under != o.ID && seen.GetRevision() > o.Revision
}

// String says what was found, for a sentence about the store.
func (o Opening) String() string {
	if o.ID == "" {
		return ""
	}
	return fmt.Sprintf(" (%d when it was opened)", o.Revision)
}

// checkSeen refuses an agent that has seen more than the store holds. That is
// evidence, or a lie: no other agent suffers from it.
func (s *Service) checkSeen(ctx context.Context, caller *Caller, seen *capb.Seen) error {
	switch {
	case s.opts.Opening.contradicts(seen):
		return s.rolledBack(ctx, caller, s.registry.Revision(), seen)
	case s.holds(seen):
		return nil // all but always: no look at the store
	}
	ctx, cancel := context.WithTimeout(ctx, catchUpTimeout)
	defer cancel()
	// Linearizable: on a replica whose picture lags this is not behind.
	revision, err := s.opts.Store.Revision(ctx)
	if err == nil && revision >= seen.GetRevision() {
		if err = s.registry.Wait(ctx, revision); err == nil && s.holds(seen) {
			return nil
		}
	}
	if err != nil {
		return s.behind(err)
	}
	return s.rolledBack(ctx, caller, revision, seen)
}

// holds says whether the picture is at least as new as what was seen. Which
// policy bundle an agent follows is not said, so the highest generation of any
// counts.
func (s *Service) holds(seen *capb.Seen) bool {
	revision, sequence, generation := s.registry.Numbers()
	return revision >= seen.GetRevision() && sequence >= seen.GetTrustBundleSequence() && generation >= seen.GetPolicyGeneration()
}

// behind refuses because an older picture would take revocations away from an
// agent that has them already.
func (s *Service) behind(err error) error {
	if errors.Is(err, store.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		return status.Error(codes.Unavailable, "this CA's picture is older than what the agent has seen, and its store does not answer")
	}
	return err
}

func (s *Service) rolledBack(ctx context.Context, caller *Caller, revision uint64, seen *capb.Seen) error {
	_, sequence, generation := s.registry.Numbers()
	s.metrics.rollback.Inc()
	s.evidence.Do(func() {
		s.log.LogAttrs(ctx, slog.LevelError, "an agent has seen more than the store holds: the store was put back to an earlier state",
			slog.String("spiffe_id", caller.Name),
			slog.Uint64("revision", revision), slog.Uint64("opened_revision", s.opts.Opening.Revision), slog.Uint64("seen_revision", seen.GetRevision()),
			slog.Uint64("trust_bundle_sequence", sequence), slog.Uint64("seen_trust_bundle_sequence", seen.GetTrustBundleSequence()),
			slog.Uint64("policy_generation", generation), slog.Uint64("seen_policy_generation", seen.GetPolicyGeneration()),
			slog.String("hint", fmt.Sprintf("restore the newest backup; or, if what is missing is lost, stop the CA and start it once with -accept-older-store=%d", revision)))
	})
	cause := status.Errorf(codes.FailedPrecondition,
		"the CA's store is at revision %d%s, trust bundle %d and policy generation %d, and this agent has seen %d, %d and %d: the store was put back to an earlier state. "+
			"On the CA's machine: restore the newest backup; or, if what is missing is lost, start merlon-ca once with -accept-older-store=%d",
		revision, s.opts.Opening, sequence, generation, seen.GetRevision(), seen.GetTrustBundleSequence(), seen.GetPolicyGeneration(), revision)
	return s.refuse(ctx, caller, audit.Record{Detail: capb.Node_Sync_FullMethodName}, cause)
}

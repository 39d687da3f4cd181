// How many SVIDs one agent gets. What all agents share is the CA's time and the
// room in its log: an agent that has gone mad, or is somebody else's, has a share
// of that and no more. The share grows with the agent's entries, so that a node
// that starts, with all its workloads at once, stays far below it.

package api

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"golang.org/x/time/rate"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/registry"
)

const (
	// entriesPerSVID is how many entries add one SVID a second to a share: each of
	// them may have an SVID every 20 s, which is the half of 40 s.
	entriesPerSVID = 20
	// shareSeconds is how many seconds' worth an agent gets at once: three SVIDs for
	// each of its entries, and those of the base.
	shareSeconds = 60
	// countInterval is how often at most the entries of an agent are counted.
	countInterval = time.Second
	// ownRate is a share of renewals of agents' own SVIDs, which a node that spent
	// the other one still needs.
	ownRate = 1
	// quotaLog is how often at most the log names an agent.
	quotaLog = time.Minute
)

// quota are the shares of agents. It is safe for concurrent use. What it knows is
// gone with the process: a CA that starts serves all agents that come back.
type quota struct {
	base   float64  // SVIDs a second, of an agent without entries
	agents sync.Map // spiffeid.ID → *share; as many as there are agents
}

// share is what one agent has spent.
type share struct {
	svids, own spent
	warning    rate.Sometimes

	mu      sync.Mutex
	rate    float64   // SVIDs a second
	counted time.Time // when rate was found
}

func newQuota(base int) *quota { return &quota{base: float64(base)} }

func (q *quota) of(agent spiffeid.ID) *share {
	if s, ok := q.agents.Load(agent); ok {
		return s.(*share)
	}
	s, _ := q.agents.LoadOrStore(agent, &share{warning: rate.Sometimes{Interval: quotaLog}})
	return s.(*share)
}

// take spends n SVIDs of s, or says after how long there would be as many. The
// entries are counted when there seem to be too few.
func (q *quota) take(s *share, n int, now time.Time, entries func() int) (wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.counted.IsZero() || now.Sub(s.counted) >= countInterval && s.svids.short(n, s.rate, now) > 0 {
		s.rate, s.counted = q.base+float64(entries())/entriesPerSVID, now
	}
	return s.svids.take(n, s.rate, now)
}

// spent is what was taken and has not come back, as of a time.
type spent struct {
	n  float64
	at time.Time
}

// short is how long it takes until n more can be taken at rate; 0: now.
func (s spent) short(n int, rate float64, now time.Time) time.Duration {
	over := s.left(rate, now) + float64(n) - shareSeconds*rate
	return max(0, time.Duration(over/rate*float64(time.Second)))
}

// left is what has not come back at now.
func (s spent) left(rate float64, now time.Time) float64 {
	return max(0, s.n-rate*max(0, now.Sub(s.at).Seconds()))
}

func (s *spent) take(n int, rate float64, now time.Time) (wait time.Duration) {
	if wait = s.short(n, rate, now); wait > 0 {
		return wait
	}
	s.n = s.left(rate, now) + float64(n)
	if now.After(s.at) { // who comes late to the lock has an earlier now
		s.at = now
	}
	return 0
}

// affords lets the calling agent have n more SVIDs, or refuses; what is what it
// asks for.
func (s *Service) affords(ctx context.Context, caller *Caller, g *registry.Grounds, n int, what string, now time.Time) error {
	sh := s.quota.of(caller.Agent.ID)
	return s.spend(ctx, caller, what, sh, s.quota.take(sh, n, now, g.Count))
}

// affordsOwn is affords for the agent's own SVID.
func (s *Service) affordsOwn(ctx context.Context, caller *Caller, now time.Time) error {
	sh := s.quota.of(caller.Agent.ID)
	sh.mu.Lock()
	wait := sh.own.take(1, ownRate, now)
	sh.mu.Unlock()
	return s.spend(ctx, caller, "renew", sh, wait)
}

func (s *Service) spend(ctx context.Context, caller *Caller, what string, sh *share, wait time.Duration) error {
	if wait <= 0 {
		return nil
	}
	s.metrics.quota.Inc()
	sh.warning.Do(func() {
		s.log.LogAttrs(ctx, slog.LevelWarn, "an agent asks for more SVIDs than its share (agent_issue_rate): look what runs there; merlon agent ban ends all that it has, if it is not the node's any more",
			slog.String("spiffe_id", caller.Name), slog.String("call", what))
	})
	return s.refuse(ctx, caller, audit.Record{Detail: what}, overspent(caller.Name, wait))
}

// overspent is the answer, with the reason and when to ask again.
func overspent(name string, wait time.Duration) error {
	wait = max(wait, time.Millisecond).Round(time.Millisecond)
	st := status.Newf(codes.ResourceExhausted, "%s has had as many SVIDs as it may have for now (agent_issue_rate): ask again in %s", name, wait)
	info := &errdetails.ErrorInfo{Reason: reasonOf(capb.Refusal_REFUSAL_ISSUE_QUOTA), Domain: refusalDomain}
	if with, err := st.WithDetails(info, &errdetails.RetryInfo{RetryDelay: durationpb.New(wait)}); err == nil {
		st = with
	}
	return st.Err()
}

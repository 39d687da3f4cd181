// The record of the decisions that were made here. The agent keeps it, so that
// `merlon explain decision` and its counters know them like its own.

package sdk

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
)

const (
	// maxPending is how many records wait for the agent; further ones are counted.
	maxPending = 512
	// allowedPerSecond is how many calls that are allowed are recorded.
	allowedPerSecond = 10
	// reportPause is the least time between two messages, and reportEvery the
	// longest in which counts are sent.
	reportPause = 20 * time.Millisecond
	reportEvery = 5 * time.Second
)

var reasons = policy.Reasons()

// report holds what the agent has not been told yet.
type report struct {
	decided [16]atomic.Uint64 // by place in reasons
	second  atomic.Int64      // in which calls that were allowed are counted
	sampled atomic.Int64      // of these

	mu sync.Mutex
	// guarded by mu
	pending []*agentpb.DecisionRecord
	dropped uint64
	wake    chan struct{}
}

func newReport() *report { return &report{wake: make(chan struct{}, 1)} }

// note takes a decision in. It never blocks; calls that are allowed cost two
// atomic additions but for a few in each second.
func (r *report) note(id *Identity, in *policy.Input, d policy.Decision, now time.Time) {
	if i := slices.Index(reasons, d.Reason); i >= 0 {
		r.decided[i].Add(1)
	}
	if d.Allow && !r.sample(now) {
		return
	}
	rec := &agentpb.DecisionRecord{
		Decision: &agentpb.Decision{
			Allow: d.Allow, Reason: string(d.Reason), RuleId: d.RuleID, DecisionId: d.DecisionID.String(), PolicyGeneration: d.Revision,
		},
		Input: authorizeRequest(in, id.current.Load()), DecidedAt: timestamppb.New(now),
	}
	r.mu.Lock()
	if len(r.pending) < maxPending {
		r.pending = append(r.pending, rec)
	} else if !d.Allow {
		r.dropped++
	}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// sample says whether one more allowed call of this second is recorded.
func (r *report) sample(now time.Time) bool {
	if s := now.Unix(); r.second.Load() != s {
		r.second.Store(s)
		r.sampled.Store(0)
	}
	return r.sampled.Load() < allowedPerSecond && r.sampled.Add(1) <= allowedPerSecond
}

// take empties r into a message; nil where there is nothing to tell.
func (r *report) take() *agentpb.ReportRequest {
	m := &agentpb.ReportRequest{Decided: map[string]uint64{}}
	for i := range reasons {
		if n := r.decided[i].Swap(0); n > 0 {
			m.Decided[string(reasons[i])] = n
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	m.Records, r.pending = r.pending, nil
	m.Dropped, r.dropped = r.dropped, 0
	if len(m.Records) == 0 && len(m.Decided) == 0 && m.Dropped == 0 {
		return nil
	}
	return m
}

// giveBack takes in again what could not be sent; records as far as there is room.
func (r *report) giveBack(m *agentpb.ReportRequest) {
	for i, reason := range reasons {
		r.decided[i].Add(m.GetDecided()[string(reason)])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropped += m.GetDropped()
	for _, rec := range m.GetRecords() {
		if len(r.pending) < maxPending {
			r.pending = append(r.pending, rec)
		} else if !rec.GetDecision().GetAllow() {
			r.dropped++
		}
	}
}

// sendReports is one stream to the agent.
func (id *Identity) sendReports(ctx context.Context, progress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := id.agent.local.Report(ctx)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { // the answer comes when the agent ends the stream
		ended <- stream.RecvMsg(new(agentpb.ReportResponse))
	}()
	every := time.NewTicker(reportEvery)
	defer every.Stop()
	for {
		select {
		case <-id.report.wake:
		case <-every.C:
		case err := <-ended:
			return err
		}
		if m := id.report.take(); m != nil {
			if err := stream.Send(m); err != nil { // io.EOF: the reason comes as the answer
				id.report.giveBack(m)
				return <-ended
			}
			progress()
		}
		if !sleep(ctx, reportPause) {
			return ctx.Err()
		}
	}
}

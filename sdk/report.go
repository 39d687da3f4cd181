// The record of the decisions that were made here. The agent keeps it, so that
// `merlon explain decision`, its counters and its log know them like its own.

package sdk

import (
	"context"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/policy"
	"merlon.dev/policy/decisionlog"
)

const (
	// maxPending is how many records wait for the agent; further ones are counted.
	maxPending = 512
	// allowedPerSecond is about how many calls that are allowed are recorded.
	allowedPerSecond = 10
	// reportPause is the least time between two messages, and reportEvery the
	// longest in which counts are sent.
	reportPause = 20 * time.Millisecond
	reportEvery = 5 * time.Second
	// lastWord is how long Close may wait for the agent to take what is left.
	lastWord = 300 * time.Millisecond
	// reportBytes bounds the records of a message, and again its rows: the agent
	// takes 1 MiB.
	reportBytes = 384 << 10
)

// report holds what the agent has not been told yet.
type report struct {
	*decisionlog.Recorder
	// What follows is the sender's alone. unsent is a message that was not
	// delivered, and told how many drops it and those before it tell of.
	unsent *agentpb.ReportRequest
	done   func() // takes the counts of unsent
	told   uint64

	poked chan struct{} // receives when there is something to tell beside records
}

func newReport() *report {
	return &report{
		Recorder: decisionlog.NewRecorder(decisionlog.Options{Records: maxPending, AllowsPerSecond: allowedPerSecond}),
		poked:    make(chan struct{}, 1),
	}
}

// poke has what there is to tell of the policy sent soon.
func (r *report) poke() {
	select {
	case r.poked <- struct{}{}:
	default:
	}
}

// note takes in a decision that the agent does not know, and that audit mode lets it
// through if so. It never blocks.
func (id *Identity) note(in *policy.Input, d *policy.Decision, now time.Time) {
	if own := id.current.Load(); in.Destination == "" && own.svid != nil {
		named := *in
		named.Destination = own.svid.ID.String()
		in = &named
	}
	d.LetThrough = d.LetThrough || !d.Allow && id.audit.lets(d.Reason, now)
	id.report.Record(in, d, now)
}

// refused is the denial of in for a reason that stands before any policy.
func (id *Identity) refused(in *policy.Input, reason policy.Reason) policy.Decision {
	d := policy.Deny(reason)
	id.note(in, &d, time.Now())
	return d
}

// message is what there is to tell; nil for nothing. It comes again until sent is
// called.
func (r *report) message() *agentpb.ReportRequest {
	if r.unsent != nil {
		return r.unsent
	}
	m := &agentpb.ReportRequest{Decided: map[string]uint64{}}
	for size := 0; size < reportBytes; {
		if n := r.Take(1, func(rec *decisionlog.Record) { m.Records = append(m.Records, recordOf(rec)) }); n == 0 {
			break
		}
		size += proto.Size(m.GetRecords()[len(m.GetRecords())-1])
	}
	rows, done := r.TakeCounts(reportBytes)
	for _, c := range rows {
		m.Rows = append(m.Rows, &agentpb.DecisionCount{
			Source: text(c.Source), Destination: text(c.Destination), RuleId: text(c.RuleID), Reason: string(c.Reason), Count: c.N,
		})
		m.Decided[string(c.Reason)] += c.N
	}
	dropped := r.Dropped()
	m.Dropped, r.told = dropped-r.told, dropped
	if len(m.GetRecords()) == 0 && len(rows) == 0 && m.GetDropped() == 0 {
		return nil
	}
	r.unsent, r.done = m, done
	return m
}

func (r *report) sent() {
	r.done()
	r.unsent, r.done = nil, nil
}

func recordOf(rec *decisionlog.Record) *agentpb.DecisionRecord {
	d := rec.Decision()
	return &agentpb.DecisionRecord{
		Decision: &agentpb.Decision{
			Allow: d.Allow, Reason: string(d.Reason), RuleId: text(d.RuleID), DecisionId: d.DecisionID.String(),
			PolicyGeneration: d.Revision, DryRun: d.DryRun, LetThrough: d.LetThrough,
		},
		Input: authorizeRequest(rec.Input(), &current{}), DecidedAt: timestamppb.New(rec.At()),
		StandsFor: rec.StandsFor(), Incomplete: rec.Incomplete().Names(),
	}
}

// text is s as a message can carry it.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// sendReports is one stream to the agent. It outlives ctx by the last word.
func (id *Identity) sendReports(ctx context.Context, progress func()) error {
	outlives, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(lastWord, cancel) })()
	stream, err := id.agent.local.Report(outlives)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { // the answer comes when the agent ends the stream
		ended <- stream.RecvMsg(new(agentpb.ReportResponse))
	}()
	every := time.NewTicker(reportEvery)
	defer every.Stop()
	told := uint64(0) // which version of the policy is in use here
	id.report.poke()
	for {
		if id.report.unsent == nil && !id.report.Waiting() {
			select {
			case <-id.report.Woken():
			case <-id.report.poked:
			case <-every.C:
			case <-ctx.Done():
				return id.sendRest(stream, ended)
			case err := <-ended:
				return err
			}
		}
		records := id.report.message()
		if m := id.withPolicy(records, told); m != nil {
			if err := stream.Send(m); err != nil { // io.EOF: the reason comes as the answer
				return <-ended
			}
			if records != nil {
				id.report.sent()
			}
			told = m.GetPolicyVersion()
			progress()
		}
		if !sleep(ctx, reportPause) {
			return id.sendRest(stream, ended)
		}
	}
}

// sendRest tells what is left before the Identity is gone, and waits until the agent has
// taken it.
func (id *Identity) sendRest(stream grpc.ClientStreamingClient[agentpb.ReportRequest, agentpb.ReportResponse], ended <-chan error) error {
	for m := id.report.message(); m != nil; m = id.report.message() {
		if err := stream.Send(m); err != nil {
			break
		}
		id.report.sent()
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return <-ended
}

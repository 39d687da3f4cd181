// The Sync stream: what the CA pushes comes in, acknowledgements and questions go out,
// and a replica that cannot reach its store is noticed.

package caclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/ca/capb"
)

const (
	// firstWord is how long a replica may take to say something, where there
	// are others.
	firstWord = 15 * time.Second
	// lookForFresh is how often an agent of a replica that cannot reach its
	// store looks for one that can.
	lookForFresh = 10 * time.Second
	// reportPause keeps reports about the policy from following each other.
	reportPause = time.Second
	// ackPause keeps acknowledgements from following each other too closely.
	ackPause = 20 * time.Millisecond
)

var errNoWord = errors.New("the CA does not say anything, and there are others")

// stream is one Sync stream and what came on it.
type stream struct {
	*Client
	picture *cache.Cache
	node    capb.NodeClient
	link    *link
	// patient: the replica is followed also if it cannot reach its store,
	// because no other can; look says for how long.
	patient bool
	look    *time.Timer
	clock   *clock

	joined    bool
	announced []*capb.PolicyBundle // by the update that is not complete yet
}

// follow applies the stream to the picture until it ends, the CA falls silent,
// the agent has a new SVID to connect with, or the replica cannot reach its
// store and others are to be tried.
func (s *stream) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := s.watch(cancel)
	defer stop()
	quiet := &silence{ask: s.askAgain, reads: &s.link.reads, most: s.hearWithin(), stop: cancel}
	quiet.expect(0)
	defer quiet.hear()
	stream, err := s.node.Sync(ctx)
	if err != nil {
		return fmt.Errorf("open the Sync stream: %w", causeOr(ctx, err))
	}
	first := s.ack(s.picture)
	if err := stream.Send(&capb.SyncRequest{
		ResumeRevision: s.picture.Resume(), Ack: first, Seen: s.seen(s.picture), Ask: s.clock.ask(time.Now()),
	}); err != nil {
		// io.EOF; Recv says why.
		_, err = stream.Recv()
		return fmt.Errorf("open the Sync stream: %w", causeOr(ctx, err))
	}
	defer s.picture.Disconnected()
	var sending sync.WaitGroup
	defer sending.Wait()
	defer cancel(nil)
	up := &upward{stream: stream}
	sending.Go(func() { s.sendAcks(ctx, cancel, up, first) })
	sending.Go(func() { s.sendPolicyReports(ctx, up) })
	for {
		m, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("follow the Sync stream: %w", causeOr(ctx, err))
		}
		stop()
		quiet.hear()
		if err := s.take(ctx, m); err != nil {
			return err
		}
		quiet.expect(m.GetNextWithin().AsDuration())
	}
}

// watch ends the stream when it is time to try another replica: this one does
// not answer, or cannot reach its store. Stop is for when it has answered.
func (s *stream) watch(cancel context.CancelCauseFunc) (stop func()) {
	if len(s.cfg.Addresses) == 1 {
		return func() {}
	}
	word := time.AfterFunc(s.firstWord, func() { cancel(errNoWord) })
	if s.patient {
		s.look = time.AfterFunc(jittered(s.lookAgain), func() { cancel(errLook) })
	}
	return func() { word.Stop() }
}

func causeOr(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// take applies one message. Calls go to the CA, and its policy counts, once it
// has shown that it does not know less than this node.
func (s *stream) take(ctx context.Context, m *capb.SyncResponse) error {
	if m.GetStale() && !s.patient {
		s.standing.spoke(ctx, s.link.address, true)
		return errStale
	}
	s.checkClock(ctx, m)
	s.noteOpening(m.GetOpening())
	before := s.picture.State()
	if err := s.apply(ctx, s.picture, m); err != nil {
		return fmt.Errorf("apply what the CA sent: %w", err)
	}
	s.logs.take(ctx, m.GetLogCheckpoint(), s.picture.Trust(), time.Now())
	if pb := m.GetPolicyBundle(); pb != nil {
		s.announced = append(s.announced, pb)
	}
	if !m.GetSynced() {
		return nil
	}
	if !s.joined {
		s.joined = true
		s.heed(nil)
		s.links.use(s.link)
		s.picture.TryAgain()
		s.standing.joined(ctx, s.link.address, m.GetStale())
	} else if before.Stale && !m.GetStale() {
		s.picture.TryAgain()
	}
	s.standing.spoke(ctx, s.link.address, m.GetStale())
	if !m.GetStale() && len(s.cfg.Addresses) > 1 {
		s.patient = false
		s.stopLooking()
	}
	for _, pb := range s.announced {
		if m.GetRevision() >= before.Revision { // or else a newer one is known
			s.cfg.OnPolicyBundle(pb)
		}
	}
	s.announced = nil
	signal(s.ackAgain)
	signal(s.sawMore)
	return nil
}

func (s *stream) stopLooking() {
	if s.look != nil {
		s.look.Stop()
	}
}

func (c *Client) apply(ctx context.Context, picture *cache.Cache, m *capb.SyncResponse) error {
	before := picture.Trust()
	err := picture.Apply(ctx, m)
	if trust := picture.Trust(); trust != before {
		c.replaceOwn(trust, time.Now())
		if err := c.saveTrust(trust); err != nil {
			// It is in use; only a restart would not have it.
			c.cfg.Logger.LogAttrs(ctx, slog.LevelError, "trust bundle not saved", slog.Any("err", err))
		}
	}
	return err
}

func (c *Client) ack(picture *cache.Cache) *capb.SyncAck {
	own := c.own.Load()
	revision, sequence := picture.Ack(own != nil && own.taintedBy(picture.Trust()))
	return &capb.SyncAck{Revision: revision, TrustBundleSequence: sequence, PolicyGeneration: c.cfg.PolicyGeneration()}
}

// askAgain asks the CA whether it is there.
func (s *stream) askAgain() {
	s.clock.want()
	signal(s.ackAgain)
}

// sendAcks tells the CA what the node serves, whenever that grew, asks it
// where that is wanted, and ends the stream when the agent has a new SVID.
func (s *stream) sendAcks(ctx context.Context, cancel context.CancelCauseFunc, up *upward, last *capb.SyncAck) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.gotOwn:
			cancel(errRenewed)
			return
		case <-s.picture.Served():
		case <-s.ackAgain:
		}
		var m capb.SyncRequest
		now := s.ack(s.picture)
		if now.Revision != last.Revision || now.TrustBundleSequence != last.TrustBundleSequence || now.PolicyGeneration != last.PolicyGeneration {
			m.Ack, last = now, now
		}
		if m.Ask = s.clock.ask(time.Now()); m.Ack == nil && m.Ask == 0 {
			continue
		}
		if up.send(&m) != nil {
			return // Recv says why
		}
		if pause(ctx, ackPause) != nil {
			return
		}
	}
}

// upward is the agent's side of a stream, for several senders.
type upward struct {
	mu     sync.Mutex // held while something is sent
	stream capb.Node_SyncClient
}

func (u *upward) send(m *capb.SyncRequest) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.stream.Send(m)
}

// PolicyReports are what is told of the policy on the node.
type PolicyReports interface {
	// ReportDue receives when there may be something new.
	ReportDue() <-chan struct{}
	// PolicyReport returns what is new, nil for nothing; all but counts, where whole
	// is set. NotReported says that it was not sent.
	PolicyReport(whole bool) *capb.PolicyReport
	NotReported()
}

// sendPolicyReports tells the CA at once how the policy stands, and then what is new.
func (c *Client) sendPolicyReports(ctx context.Context, up *upward) {
	if c.cfg.PolicyReports == nil {
		return
	}
	reports := c.cfg.PolicyReports()
	for whole := true; ; whole = false {
		if m := reports.PolicyReport(whole); m != nil {
			if up.send(&capb.SyncRequest{PolicyReport: m}) != nil {
				reports.NotReported() // Recv says why
				return
			}
		}
		if pause(ctx, reportPause) != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-reports.ReportDue():
		}
	}
}

// A nested CA's way to the CA above it: one stream, on which everything that both
// have in common comes down as it changes, and what was revoked here, and who serves
// which trust bundle, goes up. While it is down this CA goes on with what it has,
// until its intermediate ends, and says to its agents how old that is.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/nested"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/upstream"
	"merlon.dev/sdk/health"
	"merlon.dev/sdk/svid"
)

const (
	// The stream is opened again after a pause that doubles.
	minAbovePause = 250 * time.Millisecond
	maxAbovePause = 15 * time.Second
	// aboveSilence is after how long without a message a stream is given up: one
	// comes every 10 s.
	aboveSilence = 30 * time.Second
	aboveTimeout = 20 * time.Second
	// aboveReport is how often to look whether those below have caught up.
	aboveReport = time.Second
	// neverHeard is the age of what a CA knows that has not heard since its start.
	neverHeard = 10 * 365 * 24 * time.Hour
	// maxNamedBehind and maxUpward are what one message may hold (ca/internal/api).
	maxNamedBehind = 100
	maxUpward      = 1000
)

// above is the CA above this nested one. Its methods are safe for concurrent use.
type above struct {
	address  string
	name     string // of this CA
	realm    uint32
	mirror   *nested.Mirror
	keys     *upstream.Keys
	registry *registry.Registry
	own      *ownSVID
	viewer   registry.Viewer
	log      *slog.Logger

	// seen is the highest revision of the CA above up to which everything is here,
	// of this run; the store has those at which something changed. Of run alone.
	seen uint64

	heard atomic.Pointer[time.Time] // when everything was here that it knew; nil: not since the start
	fault atomic.Pointer[error]     // why the stream is down; nil while it is up
}

// above is what this nested CA has above it.
func (s *Server) above(p *parts) *above {
	u := &above{
		address: s.cfg.UpstreamAddress, name: p.keys.Name(), realm: p.realm, mirror: p.mirror, keys: p.keys, registry: p.registry,
		viewer: registry.Viewer{Replica: p.keys.Name(), X509SVID: s.cfg.X509SVIDTTL, JWTSVID: s.cfg.JWTSVIDTTL}, log: s.log,
	}
	u.fault.Store(&errNotYet)
	return u
}

// errNotYet is the fault before the first attempt.
var errNotYet = errors.New("not connected yet")

// errSilent ends a stream on which nothing comes.
var errSilent = fmt.Errorf("nothing was heard for %s", aboveSilence)

// run follows the CA above until ctx ends, or this one was evicted.
func (u *above) run(ctx context.Context) error {
	pause := minAbovePause
	for ctx.Err() == nil {
		started := time.Now()
		err := u.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if api.WasEvicted(err) {
			u.log.LogAttrs(ctx, slog.LevelError, "the CA above has withdrawn this one", slog.String("address", u.address), slog.Any("err", err))
			return u.mirror.Withdraw(ctx, u.name)
		}
		u.fails(ctx, err)
		if time.Since(started) > maxAbovePause {
			pause = minAbovePause
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, maxAbovePause)
	}
	return nil
}

// fails notes why the stream is down, and logs it when that is news.
func (u *above) fails(ctx context.Context, err error) {
	if before := u.fault.Swap(&err); before != nil && kindOf(*before) == kindOf(err) {
		return
	}
	about := []slog.Attr{slog.String("address", u.address), slog.Time("until", u.keys.X509().NotAfter()), slog.Any("err", err)}
	if refusal(err) {
		u.log.LogAttrs(ctx, slog.LevelWarn, "this CA and the one above do not go together, so neither hears what the other revokes; it goes on until its intermediate ends", about...)
		return
	}
	u.log.LogAttrs(ctx, slog.LevelWarn, "the CA above is away; this one goes on until its intermediate ends", about...)
}

// kindOf is err without its figures: ports, revisions and times change with each
// attempt, and the reason does not.
func kindOf(err error) string {
	return strings.Map(func(c rune) rune {
		if unicode.IsDigit(c) {
			return -1
		}
		return c
	}, err.Error())
}

// call makes one call.
func (u *above) call(ctx context.Context, do func(context.Context, capb.NestedClient) error) error {
	conn, err := u.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, aboveTimeout)
	defer cancel()
	return do(ctx, capb.NewNestedClient(conn))
}

func (u *above) dial() (*grpc.ClientConn, error) {
	cfg := svid.TLS{SVIDs: u.own, Bundles: u.registry, Admit: svid.AdmitID(entry.CAID(u.own.td))}.Client()
	return grpc.NewClient(u.address, grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithNoProxy())
}

// follow holds one stream until it ends.
func (u *above) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var up sync.WaitGroup
	defer up.Wait()
	defer cancel(nil)
	conn, err := u.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	silent := time.AfterFunc(aboveSilence, func() { cancel(errSilent) })
	defer silent.Stop()
	stream, err := capb.NewNestedClient(conn).Follow(ctx)
	if err != nil {
		return err
	}
	revision, sequence, err := u.mirror.Seen(ctx)
	if err != nil {
		return err
	}
	u.seen = max(u.seen, revision)
	r := reporting{above: u, stream: stream}
	first := r.next(time.Now())
	first.Seen = &capb.Seen{Revision: u.seen, TrustBundleSequence: sequence}
	if err := stream.Send(first); err != nil {
		return receiveError(ctx, stream)
	}
	up.Go(func() { r.run(ctx) })
	for {
		msg, err := stream.Recv()
		if err != nil {
			return streamError(ctx, err)
		}
		silent.Reset(aboveSilence)
		if err := u.take(ctx, msg); err != nil {
			return err
		}
	}
}

// receiveError is why a stream ended that could not be written to.
func receiveError(ctx context.Context, stream grpc.BidiStreamingClient[capb.FollowRequest, capb.FollowResponse]) error {
	_, err := stream.Recv()
	return streamError(ctx, err)
}

func streamError(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); errors.Is(cause, errSilent) {
		return cause
	}
	return err
}

// take puts down one message.
func (u *above) take(ctx context.Context, msg *capb.FollowResponse) error {
	if revision := msg.GetRevision(); revision != 0 && revision < u.seen {
		return fmt.Errorf("%w: it is at revision %d, and this one has seen %d", nested.ErrOlder, revision, u.seen)
	}
	changed := msg.GetState() != nil || len(msg.GetRevocations()) > 0
	if msg.GetState() != nil {
		if _, err := u.mirror.Apply(ctx, stateOf(msg.GetState())); err != nil {
			return err
		}
	}
	var records []revocation.Shared
	for _, p := range msg.GetRevocations() {
		r, err := api.SharedFromProto(p)
		if err != nil {
			return err // to leave it out would be to take it back
		}
		records = append(records, r)
	}
	if err := u.mirror.Import(ctx, u.realm, records, time.Now()); err != nil {
		return err
	}
	if msg.GetRevision() == 0 {
		return nil
	}
	if changed || u.seen == 0 {
		if err := u.mirror.Follows(ctx, msg.GetRevision()); err != nil {
			return err
		}
	}
	u.seen = msg.GetRevision()
	if !msg.GetStale() {
		u.isUp(ctx)
	}
	return nil
}

func (u *above) isUp(ctx context.Context) {
	now := time.Now()
	u.heard.Store(&now)
	if u.fault.Swap(nil) != nil {
		u.log.LogAttrs(ctx, slog.LevelInfo, "the CA above is followed", slog.String("address", u.address))
	}
}

func stateOf(p *capb.SharedState) nested.State {
	return nested.State{Revision: p.GetRevision(), TrustBundle: p.GetTrustBundle(), Authorities: p.GetAuthorities(), Record: p.GetRecord()}
}

// age is how long ago this CA knew all that the one above did.
func (u *above) age(now time.Time) time.Duration {
	heard := u.heard.Load()
	if heard == nil {
		return neverHeard
	}
	return max(now.Sub(*heard), 0)
}

// check is for /ready: one that is refused hears of no revocation, nor is heard,
// until somebody acts, and its agents are better off elsewhere.
func (u *above) check() error {
	fault := u.fault.Load()
	if fault == nil || !refusal(*fault) {
		return nil
	}
	return fmt.Errorf("this CA and the one above, at %s, do not go together, so neither hears what the other revokes: %w", u.address, *fault)
}

// refusal tells what stands in the way until somebody acts from a CA above that is
// away.
func refusal(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
		return true
	default:
		return errors.Is(err, nested.ErrOlder)
	}
}

// note is for /ready, too, which stays good while the CA above is away.
func (u *above) note() string {
	fault := u.fault.Load()
	if fault == nil || refusal(*fault) {
		return ""
	}
	since := "since the start"
	if heard := u.heard.Load(); heard != nil {
		since = "since " + heard.UTC().Format(time.RFC3339)
	}
	return fmt.Sprintf("the CA above, at %s, is away %s; this one goes on until its intermediate ends at %s: %v",
		u.address, since, u.keys.X509().NotAfter().UTC().Format(time.RFC3339), *fault)
}

// watch tells health and metrics.
func (u *above) watch(h *health.Server) {
	h.Check("nested", u.check)
	h.Note("upstream", u.note)
	h.Registry().MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "merlon_ca_upstream_connected", Help: "Whether this nested CA follows the CA above it.",
		}, func() float64 {
			if u.fault.Load() != nil {
				return 0
			}
			return 1
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "merlon_ca_upstream_age_seconds", Help: "How long ago this nested CA knew all that the CA above it did.",
		}, func() float64 { return u.age(time.Now()).Seconds() }),
	)
}

// reporting is what goes up on one stream.
type reporting struct {
	*above
	stream   grpc.BidiStreamingClient[capb.FollowRequest, capb.FollowResponse]
	sent     uint64 // every revocation that was made here up to this revision
	sequence uint64
	behind   []string
	looked   time.Time
}

// run sends what is new until the stream ends: revocations at once, what is served
// below within a second.
func (r *reporting) run(ctx context.Context) {
	for ctx.Err() == nil {
		wait, cancel := context.WithTimeout(ctx, aboveReport)
		_ = r.registry.Wait(wait, r.sent+1) // fails at the end of the wait only
		cancel()
		for {
			msg := r.next(time.Now())
			if msg == nil {
				break
			}
			if r.stream.Send(msg) != nil {
				return // the receiver learns why
			}
		}
	}
}

// next is the next message; nil where there is nothing new. The first there always
// is.
func (r *reporting) next(now time.Time) *capb.FollowRequest {
	msg := &capb.FollowRequest{}
	records, at := r.registry.RevocationsAfter(r.sent, now)
	for _, rec := range records {
		if rec.Imported {
			continue
		}
		if len(msg.GetRevocations()) == maxUpward {
			at = rec.Revision - 1
			break
		}
		msg.Revocations = append(msg.Revocations, api.SharedToProto(r.restated(rec.Share())))
	}
	r.sent = at
	if !r.look(now) && len(msg.GetRevocations()) == 0 {
		return nil
	}
	msg.TrustBundleSequence, msg.Behind = r.sequence, r.behind
	return msg
}

// restated is rec as of the realm that this CA has now. It may have made it in a
// former one: before it was evicted, while nobody above heard it. Left out, what it
// names would stay good everywhere else; under the former realm it is not this CA's
// to send, since a restore above may have given that to another. All that was issued
// in the former realm the eviction has withdrawn for good, and the limit holds in
// this one, whose revisions are of the same store.
func (r *reporting) restated(rec revocation.Shared) revocation.Shared {
	if rec.Serial == "" {
		rec.Realm = r.realm
	}
	return rec
}

// look says whether another trust bundle is served below than was reported last.
// It goes over all agents, so not with every change of the store.
func (r *reporting) look(now time.Time) (news bool) {
	if now.Before(r.looked.Add(aboveReport)) {
		return false
	}
	news, r.looked = r.looked.IsZero(), now
	_, current, _ := r.registry.Numbers()
	_, view := r.registry.Rotation(now, r.viewer)
	sequence, behind := view.Served(current, now)
	behind = behind[:min(len(behind), maxNamedBehind)]
	news = news || sequence != r.sequence || !slices.Equal(behind, r.behind)
	r.sequence, r.behind = sequence, behind
	return news
}

// Trust bundles that come by themselves: the leading replica polls, each as often as
// the last document hinted at, and writes down what became of it. What cannot be taken
// changes nothing.

package api

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

const (
	// pollLook is how often it is looked what is due.
	pollLook = 5 * time.Second
	// Without a hint a trust bundle is fetched every 5 minutes (SPIFFE Trust Domain
	// and Bundle §6.1); hints count between these.
	pollDefault = 5 * time.Minute
	pollLeast   = 10 * time.Second
	pollMost    = time.Hour
	pollsAtOnce = 8
)

// errNoSource: nobody said where the trust bundle is to be had.
var errNoSource = errors.New("it was handed over, and is not fetched: merlon federation follow, or accept, says where it is to be had")

// polling is when each source is due. It belongs to one goroutine.
type polling map[spiffeid.TrustDomain]poll

type poll struct {
	at  time.Time
	set time.Time // of which source
}

// FollowFederations fetches trust bundles as they are due, until ctx ends.
func (s *Service) FollowFederations(ctx context.Context) {
	look := time.NewTicker(pollLook)
	defer look.Stop()
	due := make(polling)
	said := ""
	for {
		err := s.pollDue(ctx, due, time.Now())
		switch {
		case err == nil:
			said = ""
		case ctx.Err() != nil || errors.Is(err, store.ErrReadOnly) || errors.Is(err, store.ErrUnavailable) || err.Error() == said: // /ready says so, or the log did
		default:
			said = err.Error()
			s.opts.Log.LogAttrs(ctx, slog.LevelError, "federated trust bundles not all looked after", slog.Any("err", err))
		}
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
	}
}

// pollDue fetches what is due at now.
func (s *Service) pollDue(ctx context.Context, due polling, now time.Time) error {
	kvs, err := s.listUnder(ctx, federation.SourcePrefix)
	if err != nil {
		return err
	}
	var sources []*federation.Source
	var unreadable error
	known := make(map[spiffeid.TrustDomain]bool)
	for _, kv := range kvs {
		src, err := federation.DecodeSource(kv)
		if err != nil { // the others are looked after all the same
			unreadable = errors.Join(unreadable, err)
			continue
		}
		known[src.TrustDomain] = true
		next, ok := due[src.TrustDomain]
		if ok && next.set.Equal(src.SetAt) && now.Before(next.at) && next.at.Sub(now) <= 2*pollMost { // the clock may have jumped
			continue
		}
		sources = append(sources, src)
	}
	for td := range due {
		if !known[td] {
			delete(due, td)
		}
	}
	intervals := make([]time.Duration, len(sources))
	var g errgroup.Group
	g.SetLimit(pollsAtOnce)
	for i, src := range sources {
		g.Go(func() error {
			intervals[i] = s.poll(ctx, src)
			return nil
		})
	}
	_ = g.Wait() // each has written down its failure
	for i, src := range sources {
		jittered := time.Duration(float64(intervals[i]) * (0.9 + 0.2*rand.Float64())) //nolint:gosec // no secret
		due[src.TrustDomain] = poll{time.Now().Add(jittered), src.SetAt}
	}
	return unreadable
}

// poll fetches once, and says how long to wait for the next time: after a failure as
// long as after a success, since a server in trouble is not helped by more requests
// (§6.2).
func (s *Service) poll(ctx context.Context, src *federation.Source) time.Duration {
	hint, err := s.fetchFrom(ctx, src)
	if err != nil {
		hint = src.RefreshHint
	}
	return min(max(cmp.Or(hint, pollDefault), pollLeast), pollMost)
}

// fetch fetches the trust bundle of td now.
func (s *Service) fetch(ctx context.Context, td spiffeid.TrustDomain) error {
	kv, _, err := s.opts.Store.Get(ctx, federation.SourcePrefix+td.Name())
	if errors.Is(err, store.ErrNotFound) {
		return errNoSource
	}
	if err != nil {
		return err
	}
	src, err := federation.DecodeSource(kv)
	if err != nil {
		return err
	}
	_, err = s.fetchFrom(ctx, src)
	return err
}

// fetchFrom fetches from src, takes the document if it may be taken, and writes down
// what became of it.
func (s *Service) fetchFrom(ctx context.Context, src *federation.Source) (hint time.Duration, err error) {
	changed, hint, err := s.fetchOnce(ctx, src)
	if err != nil && ctx.Err() != nil {
		return 0, err
	}
	s.noteFetch(ctx, src, changed, hint, err)
	return hint, err
}

func (s *Service) fetchOnce(ctx context.Context, src *federation.Source) (changed bool, hint time.Duration, err error) {
	held, cmp, err := s.heldFederated(ctx, src.TrustDomain)
	if err != nil && !errors.Is(err, trust.ErrNoFederated) {
		return false, 0, err
	}
	document, err := federation.Fetch(ctx, src, s.verifiers(held))
	if err != nil {
		return false, 0, err
	}
	refused := func(err error) error { return &federation.Error{Reason: federation.Refused, Err: err} }
	if !bytes.HasPrefix(bytes.TrimSpace(document), []byte("{")) { // PEM is for what is handed over
		return false, 0, refused(fmt.Errorf("what %s serves is no JWKS document, which alone a bundle endpoint has", src.URL))
	}
	b, err := trust.NewFederated(s.opts.TrustDomain, src.TrustDomain, document, time.Now())
	if err != nil {
		return false, 0, refused(fmt.Errorf("what %s serves is no trust bundle of %s: %w", src.URL, src.TrustDomain, err))
	}
	if err := s.checkUnshared(b); err != nil {
		return false, 0, refused(err)
	}
	if err := b.CheckFollows(held); err != nil {
		return false, 0, refused(err)
	}
	if held != nil && held.Digest() == b.Digest() {
		return false, b.RefreshHint, nil
	}
	op, err := b.Put()
	if err != nil {
		return false, 0, err
	}
	source := store.Cmp{Key: federation.SourcePrefix + src.TrustDomain.Name(), ModRevision: src.Revision} // nobody removed it meanwhile
	res, err := s.opts.Store.Txn(ctx, []store.Cmp{cmp, source}, []store.Op{op}, nil)
	if err != nil || !res.Succeeded { // somebody else was faster
		return false, b.RefreshHint, err
	}
	err = s.audit(ctx, audit.Record{
		Time: time.Now(), Type: audit.Admin, Actor: "ca",
		Detail: fmt.Sprintf("fetched federated bundle of %s: sequence %d, sha256 %s", b.TrustDomain, b.Sequence, b.Digest()),
	})
	if err == nil {
		err = s.registry.Wait(ctx, res.Revision)
	}
	return true, b.RefreshHint, err
}

// verifiers are the trust bundles that a https_spiffe server is verified by: that of
// its trust domain as it is known now.
func (s *Service) verifiers(held *trust.Federated) x509bundle.Source {
	set := x509bundle.NewSet()
	for _, b := range s.registry.Federated() {
		set.Add(x509bundle.FromX509Authorities(b.TrustDomain, b.X509))
	}
	if held != nil { // the store's is newer than the picture may be
		set.Add(x509bundle.FromX509Authorities(held.TrustDomain, held.X509))
	}
	return set
}

// noteFetch logs, counts, and writes the outcome into the source's record, unless that
// was changed or removed meanwhile.
func (s *Service) noteFetch(ctx context.Context, src *federation.Source, changed bool, hint time.Duration, err error) {
	td := slog.String("federated_trust_domain", src.TrustDomain.Name())
	reason := "ok"
	if failed, ok := errors.AsType[*federation.Error](err); ok {
		reason = failed.Reason
	} else if err != nil {
		reason = "error"
	}
	s.metrics.fetched.WithLabelValues(src.TrustDomain.Name(), reason).Inc()
	next := src.After(hint, err, time.Now())
	switch {
	case err != nil && next.Failure != src.Failure:
		s.opts.Log.LogAttrs(ctx, slog.LevelError, "federated trust bundle not fetched, the last one stays", td, slog.String("url", src.URL), slog.String("reason", reason), slog.Any("err", err))
	case err == nil && src.Failure != "":
		s.opts.Log.LogAttrs(ctx, slog.LevelInfo, "federated trust bundle fetched again", td)
	case changed:
		s.opts.Log.LogAttrs(ctx, slog.LevelInfo, "federated trust bundle changed", td)
	}
	updated := *src
	updated.Outcome = next
	op, err := updated.Put()
	if err == nil {
		_, err = s.opts.Store.Txn(ctx, []store.Cmp{{Key: op.Key, ModRevision: src.Revision}}, []store.Op{op}, nil)
	}
	if err != nil && ctx.Err() == nil {
		s.opts.Log.LogAttrs(ctx, slog.LevelDebug, "outcome of a fetch not written down", td, slog.Any("err", err))
	}
}

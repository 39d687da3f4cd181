// Fetching one trust bundle of another trust domain: what may be taken is, what became
// of it is written down, and what cannot be taken changes nothing.

package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/federation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

// errNoSource: nobody said where the trust bundle is to be had.
var errNoSource = errors.New("it was handed over, and is not fetched: merlon federation follow, or accept, says where it is to be had")

// fetch fetches the trust bundle of td now, and says what has become of it. The zero
// outcome comes with an error by which it was not even tried.
func (s *Service) fetch(ctx context.Context, td spiffeid.TrustDomain) (federation.Outcome, error) {
	kv, _, err := s.opts.Store.Get(ctx, federation.SourcePrefix+td.Name())
	if errors.Is(err, store.ErrNotFound) {
		return federation.Outcome{}, errNoSource
	}
	if err != nil {
		return federation.Outcome{}, err
	}
	src, err := federation.DecodeSource(kv)
	if err != nil {
		return federation.Outcome{}, err
	}
	had, err := s.fetchFrom(ctx, src)
	if err != nil && ctx.Err() != nil {
		return federation.Outcome{}, err
	}
	return s.noteFetch(ctx, src, had, err), err
}

// fetched is a trust bundle that came. changed: it took the place of another.
type fetched struct {
	*trust.Federated
	changed bool
}

// fetchFrom fetches from src, and takes the document if it may be taken.
func (s *Service) fetchFrom(ctx context.Context, src *federation.Source) (fetched, error) {
	held, unchanged, err := s.heldFederated(ctx, src.TrustDomain)
	if err != nil && !errors.Is(err, trust.ErrNoFederated) {
		return fetched{}, err
	}
	document, err := federation.Fetch(ctx, src, s.verifiers(held))
	if err != nil {
		return fetched{}, err
	}
	b, err := s.judge(src, document, held)
	if err != nil {
		return fetched{}, err
	}
	if held != nil && held.Digest() == b.Digest() {
		return fetched{Federated: b}, nil
	}
	op, err := b.Put()
	if err != nil {
		return fetched{}, err
	}
	source := store.Cmp{Key: federation.SourcePrefix + src.TrustDomain.Name(), ModRevision: src.Revision} // nobody removed it meanwhile
	res, err := s.opts.Store.Txn(ctx, []store.Cmp{unchanged, source}, []store.Op{op}, nil)
	if err != nil || !res.Succeeded { // somebody else was faster
		return fetched{Federated: b}, err
	}
	err = s.audit(ctx, audit.Record{
		Time: time.Now(), Type: audit.Admin, Actor: "ca",
		Detail: fmt.Sprintf("fetched federated bundle of %s: sequence %d, sha256 %s", b.TrustDomain, b.Sequence, b.Digest()),
	})
	if err == nil {
		err = s.registry.Wait(ctx, res.Revision)
	}
	return fetched{b, true}, err
}

// judge says what is wrong with the document that src serves. It takes no more than
// judgingAtOnce at a time: whoever serves it decides how much work that is.
func (s *Service) judge(src *federation.Source, document []byte, held *trust.Federated) (*trust.Federated, error) {
	s.judging <- struct{}{}
	defer func() { <-s.judging }()
	refuse := func(reason string, err error) (*trust.Federated, error) {
		return nil, &federation.Error{Reason: reason, Err: err}
	}
	if !bytes.HasPrefix(bytes.TrimSpace(document), []byte("{")) { // PEM is for what is handed over
		return refuse(federation.Refused, fmt.Errorf("what %s serves is no JWKS document, which alone a bundle endpoint has", src.URL))
	}
	b, err := trust.NewFederated(s.opts.TrustDomain, src.TrustDomain, document, time.Now())
	if err != nil {
		return refuse(federation.Refused, fmt.Errorf("what %s serves is no trust bundle of %s: %w", src.URL, src.TrustDomain, err))
	}
	if err := s.checkUnshared(b); err != nil {
		return refuse(federation.OwnKey, err)
	}
	err = b.CheckFollows(held)
	if order, ok := errors.AsType[*trust.OrderError](err); ok {
		return refuse(order.Kind, err)
	}
	return b, err
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

// noteFetch counts, logs, and writes the outcome into the source's record, unless that
// was changed or removed meanwhile.
func (s *Service) noteFetch(ctx context.Context, src *federation.Source, had fetched, err error) federation.Outcome {
	s.metrics.fetched.WithLabelValues(src.TrustDomain.Name(), federation.ReasonOf(err)).Inc()
	var document *trust.Document
	if err == nil {
		document = had.Document
	}
	next := src.After(document, err, time.Now())
	s.sayFetch(ctx, src, next, had, err)
	updated := *src
	updated.Outcome = next
	op, err := updated.Put()
	if err == nil {
		_, err = s.opts.Store.Txn(ctx, []store.Cmp{{Key: op.Key, ModRevision: src.Revision}}, []store.Op{op}, nil)
	}
	if err != nil && ctx.Err() == nil {
		s.opts.Log.LogAttrs(ctx, slog.LevelDebug, "outcome of a fetch not written down", slog.String("federated_trust_domain", src.TrustDomain.Name()), slog.Any("err", err))
	}
	return next
}

// sayFetch logs what is new in next: that it fails, for another reason, or no more, and
// what came of the document. One says nothing for the other.
func (s *Service) sayFetch(ctx context.Context, src *federation.Source, next federation.Outcome, had fetched, err error) {
	log := s.opts.Log.With(slog.String("federated_trust_domain", src.TrustDomain.Name()))
	if err != nil {
		if next.Reason != src.Reason { // the text would differ with each port that a connection had
			log.LogAttrs(ctx, slog.LevelError, "federated trust bundle not fetched, the last one stays", slog.String("url", src.URL), slog.String("reason", next.Reason), slog.Any("err", err))
		}
		return
	}
	if src.Failure != "" {
		log.LogAttrs(ctx, slog.LevelInfo, "federated trust bundle fetched again")
	}
	switch {
	case had.changed && had.Empty():
		log.LogAttrs(ctx, slog.LevelError, "federated trust bundle emptied: nobody of that trust domain is trusted")
	case had.changed:
		log.LogAttrs(ctx, slog.LevelInfo, "federated trust bundle changed")
	}
	if len(next.Ignored) > 0 && !slices.Equal(next.Ignored, src.Ignored) {
		log.LogAttrs(ctx, slog.LevelWarn, "keys of a federated trust bundle ignored", slog.Any("ignored", next.Ignored))
	}
}

// Joins OPA's bundle protocol to the store of signed policy bundles.

package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/internal/api"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/web"
	"merlon.dev/policy/bundle"
)

// bundles is the source of the bundle server.
type bundles struct {
	releases *release.Publisher
	registry *registry.Registry
	service  *api.Service
	shares   *shares
}

func (b bundles) handler(log *slog.Logger) http.Handler {
	return bundle.NewServer(bundle.Source{Load: b.load(b.releases.Current, false), LoadCandidate: b.load(b.releases.Candidate, true), Put: b.put, MaxWait: web.MaxWait, Logger: log})
}

// load serves what read reads, or the caller's share of it.
func (b bundles) load(read func(context.Context, string) ([]byte, *release.Release, error), candidate bool) func(context.Context, string) (*bundle.Published, <-chan struct{}, error) {
	return func(ctx context.Context, name string) (*bundle.Published, <-chan struct{}, error) {
		changed := b.registry.HeadsChanged() // before the read: no change is missed
		// Again for each load: the caller may have waited for minutes.
		c := web.CallerFrom(ctx)
		if c != nil {
			if fault := b.service.FaultSince(c); fault != "" {
				return nil, nil, fmt.Errorf("%s: %s", c.Name, fault)
			}
		}
		signed, r, err := read(ctx, name)
		if errors.Is(err, release.ErrNone) {
			return nil, changed, bundle.ErrNotFound
		}
		if err != nil {
			return nil, nil, err
		}
		if audience := b.audienceOf(c); audience != nil {
			p, err := b.shares.of(name, candidate, signed, r.ETag(), audience)
			return p, changed, err
		}
		return &bundle.Published{Raw: signed, ETag: r.ETag(), Generation: r.Generation}, changed, nil
	}
}

// put publishes for a caller whom ca/internal/web has found to be allowed to.
func (b bundles) put(ctx context.Context, name string, unsigned []byte) (bundle.Metadata, error) {
	caller := web.CallerFrom(ctx)
	if caller == nil {
		return bundle.Metadata{}, errors.New("upload without a caller")
	}
	head, err := b.service.Publish(ctx, caller, name, unsigned)
	if st := status.Convert(err); st.Code() == codes.InvalidArgument {
		return bundle.Metadata{}, &bundle.RejectedError{Err: errors.New(st.Message())}
	}
	if err != nil {
		return bundle.Metadata{}, err
	}
	return bundle.Metadata{Name: head.Name, Generation: head.Generation, IssuedAt: head.IssuedAt, NotAfter: head.NotAfter}, nil
}

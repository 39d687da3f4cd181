// JWT-SVIDs: fetching and validating.

package workloadapi

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/sdk/svid"
)

// Limits of what a workload may ask for in one call.
const (
	maxAudiences     = 16
	maxAudienceBytes = 2048
)

// How many JWT-SVIDs the CA makes for the workloads of one user: at once after a
// rest, and then each second. Those that are held already count nothing.
const (
	jwtBurst     = 1000
	jwtPerSecond = 100
)

// FetchJWTSVID returns a JWT-SVID for each of the caller's SPIFFE IDs, or for
// the one that it asks for.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := checkAudience(req.GetAudience()); err != nil {
		return nil, err
	}
	var only spiffeid.ID
	if req.GetSpiffeId() != "" {
		var err error
		if only, err = spiffeid.FromString(req.GetSpiffeId()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	p, entries, err := s.callers.Entitled(ctx)
	if err != nil {
		return nil, err
	}
	entries = identities(entries, only)
	if len(entries) == 0 {
		return nil, s.callers.NotAmong("the caller is not entitled to " + only.String())
	}
	m := &workload.JWTSVIDResponse{}
	var hints uniqueHints
	for _, e := range entries {
		token, err := s.jwtSVID(ctx, e, req.GetAudience())
		if err != nil {
			return nil, err
		}
		m.Svids = append(m.Svids, &workload.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: token, Hint: hints.next(e.Hint)})
	}
	// Signing took a while: is it still the same process, and still entitled?
	if p, err = s.sameCaller(ctx, p); err != nil {
		return nil, err
	}
	still, _ := s.cache.Entitled(p.Proof())
	for _, e := range entries {
		if !slices.Contains(still, e) {
			return nil, status.Error(codes.Unavailable, "the registration entries changed meanwhile; ask again")
		}
	}
	return m, nil
}

// jwtSVID returns one JWT-SVID. The CA is asked for as many new ones as the
// caller's user may have made.
func (s *Server) jwtSVID(ctx context.Context, e *cache.Entry, audience []string) (string, error) {
	var refused error
	token, err := s.cache.JWTSVID(ctx, e, audience, func() error {
		refused = s.signing.Admit(ctx, "new JWT-SVIDs", "ask for few audiences, and use a JWT-SVID again until it expires")
		return refused
	})
	switch {
	case err == nil:
		return token, nil
	case refused != nil:
		return "", refused
	default:
		return "", s.unavailable(ctx, e, err)
	}
}

// identities are the entries with each SPIFFE ID once, or with only one.
func identities(entries []*cache.Entry, only spiffeid.ID) (out []*cache.Entry) {
	seen := map[spiffeid.ID]bool{}
	for _, e := range entries {
		if !seen[e.SPIFFEID] && (only.IsZero() || e.SPIFFEID == only) {
			seen[e.SPIFFEID] = true
			out = append(out, e)
		}
	}
	return out
}

func checkAudience(audience []string) error {
	if len(audience) == 0 {
		return status.Error(codes.InvalidArgument, "audience: at least one is needed")
	}
	if len(audience) > maxAudiences {
		return status.Errorf(codes.InvalidArgument, "audience: %d given, at most %d are allowed", len(audience), maxAudiences)
	}
	for _, a := range audience {
		if a == "" {
			return status.Error(codes.InvalidArgument, "audience: must not be empty")
		}
		if len(a) > maxAudienceBytes {
			return status.Errorf(codes.InvalidArgument, "audience: longer than %d bytes", maxAudienceBytes)
		}
	}
	return nil
}

// ValidateJWTSVID checks a JWT-SVID for the caller: of the own trust domain, or of
// one that the caller's registration entries federate with.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	if req.GetAudience() == "" {
		return nil, status.Error(codes.InvalidArgument, "audience: must be given")
	}
	if req.GetSvid() == "" {
		return nil, status.Error(codes.InvalidArgument, "svid: must be given")
	}
	_, entries, err := s.callers.Entitled(ctx)
	if err != nil {
		return nil, err
	}
	bundles := s.cache.JWTBundles(entries)
	if bundles == nil {
		return nil, endpoint.Unsynced()
	}
	token, err := svid.VerifyJWT(req.GetSvid(), bundles, []string{req.GetAudience()}, time.Now())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "svid: %v", err)
	}
	if _, revoked := s.cache.Revocations().ConcerningJWT(token); revoked {
		return nil, status.Error(codes.InvalidArgument, "svid: revoked")
	}
	claims, err := structpb.NewStruct(token.Claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "svid: claims: %v", err)
	}
	if err := s.callers.Alive(ctx); err != nil {
		return nil, err
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: token.ID.String(), Claims: claims}, nil
}

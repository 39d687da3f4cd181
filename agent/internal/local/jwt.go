// The JWT-SVID of a call, for policies that read it: only what is verified for the
// called service reaches a policy.

package local

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"merlon.dev/agent/internal/cache"
	"merlon.dev/policy"
	"merlon.dev/sdk/svid"
)

// claimsOf are the claims of the JWT-SVID that in carries as its one bearer token
// (J10), if it is good: of the own trust domain or one that an entry of the called
// service federates with, for the SPIFFE ID that is called, neither ended nor
// revoked. Nil otherwise: to the policy there is none.
func (s *Server) claimsOf(ctx context.Context, in *policy.Input, called []*cache.Entry) map[string]any {
	values, _ := in.Header("authorization")
	if len(values) != 1 {
		return nil
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	bundles := s.cache.JWTBundles(called)
	if !ok || !strings.EqualFold(scheme, "Bearer") || bundles == nil {
		return nil
	}
	verified, err := svid.VerifyJWT(token, bundles, []string{in.Destination}, time.Now())
	if err != nil {
		s.o.Logger.LogAttrs(ctx, slog.LevelDebug, "JWT-SVID of a call not taken", slog.String("destination", in.Destination), slog.Any("err", err))
		return nil
	}
	if _, revoked := s.cache.Revocations().ConcerningJWT(verified); revoked {
		return nil
	}
	return verified.Claims
}

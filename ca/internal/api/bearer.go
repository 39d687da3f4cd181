// Bearer tokens: administrators without an SVID, such as people and pipelines,
// show an OIDC token with each call (ca/internal/oidc says whose it is). One call
// shows one credential: of two, it would be unclear whose act it is.

package api

import (
	"context"
	"errors"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"

	"merlon.dev/ca/internal/oidc"
)

const (
	authorization = "authorization"
	scheme        = "Bearer "
)

// bearer is the token that a call shows; shown without a token: it shows
// something that is none.
func bearer(md metadata.MD) (token string, shown bool) {
	values := md.Get(authorization)
	if len(values) != 1 {
		return "", len(values) > 0
	}
	token, _ = BearerToken(values[0])
	return token, true
}

// BearerToken is the token in the value of an Authorization header.
func BearerToken(header string) (token string, ok bool) {
	if len(header) < len(scheme) || !strings.EqualFold(header[:len(scheme)], scheme) {
		return "", false
	}
	return header[len(scheme):], true
}

// IsJWT says whether a bearer token looks like one of OIDC, and not like one that
// the CA made itself.
func IsJWT(token string) bool { return strings.Contains(token, ".") }

// TokenCaller resolves the holder of an OIDC token.
func (s *Service) TokenCaller(ctx context.Context, token string) *Caller {
	c := Anonymous()
	if s.opts.Tokens == nil {
		c.Fault = "it shows a bearer token, and the CA is configured with no oidc issuer"
		return c
	}
	id, err := s.opts.Tokens.Verify(ctx, token, time.Now())
	switch {
	case errors.Is(err, oidc.ErrUnavailable):
		c.Unsure = "its bearer token cannot be judged: " + err.Error()
	case err != nil:
		c.Fault = "its bearer token is refused: " + err.Error()
	default:
		c.Name, c.Token, c.Expiry = id.Name(), &id, id.Expiry
		c.take(id.Roles...)
	}
	return c
}

// FaultSince says why what c showed does not count any more, although it did;
// empty: it does.
func (s *Service) FaultSince(c *Caller) string {
	switch {
	case c.Peer != nil:
		return s.PeerCaller(c.Peer).Fault
	case !c.Expiry.IsZero() && !time.Now().Before(c.Expiry):
		return "its bearer token has expired"
	default:
		return ""
	}
}

// TwoCredentials is a caller that shows more than one, and so is nobody.
func TwoCredentials() *Caller {
	c := Anonymous()
	c.Fault = "it shows a bearer token beside an X509-SVID, on the admin socket or more than once: show one credential"
	return c
}

// Issues JWT-SVIDs: headers alg, kid and typ and no others (J2), aud always an
// array (J13), jti the serial number, so that a revocation reaches them too.

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"

	"merlon.dev/sdk/svid"
)

// MaxJWTAudiences is how many audiences one token can have where more than one is
// allowed. The standard advises one (J7): each can use the token at the others.
const MaxJWTAudiences = 8

// JWTAuthority signs JWT-SVIDs: with ES256 by a P-256 key, with RS256 by an RSA
// key, which some clouds want. It is immutable from its first use on, and safe for
// concurrent use as far as Signer is.
type JWTAuthority struct {
	TrustDomain spiffeid.TrustDomain
	KeyID       string
	Signer      crypto.Signer

	once  sync.Once // makes what follows, at first use
	head  string    // the header, encoded, with its dot
	key   *signing
	fault error
}

// JWTRequest asks for a JWT-SVID.
type JWTRequest struct {
	SPIFFEID spiffeid.ID
	Issuer   string   // iss, for those who take the token for an ID token; optional
	Audience []string // at least one, at most MaxJWTAudiences
	Serial   svid.Serial
	TTL      time.Duration
	Now      time.Time
}

type jwtHeader struct {
	Alg string `json:"alg"`
	Kid string `json:"kid"`
	Typ string `json:"typ"`
}

type jwtClaims struct {
	Aud []string `json:"aud"`
	Exp int64    `json:"exp"`
	Iat int64    `json:"iat"`
	Iss string   `json:"iss,omitempty"`
	Jti string   `json:"jti"`
	Sub string   `json:"sub"`
}

// Issue signs a token and says when it expires. A request that the standard or
// the trust domain rules out is an *InvalidError.
func (a *JWTAuthority) Issue(req JWTRequest) (token string, exp time.Time, err error) {
	if err := a.check(req); err != nil {
		return "", time.Time{}, err
	}
	exp = req.Now.Add(req.TTL).UTC().Truncate(time.Second)
	claims, err := json.Marshal(jwtClaims{
		Aud: req.Audience, Exp: exp.Unix(), Iat: req.Now.Unix(), Iss: req.Issuer, Jti: req.Serial.String(), Sub: req.SPIFFEID.String(),
	})
	if err != nil {
		return "", time.Time{}, fmt.Errorf("encode the JWT-SVID of %s: %w", req.SPIFFEID, err)
	}
	input := a.head + base64.RawURLEncoding.EncodeToString(claims)
	signature, err := a.key.signJWS([]byte(input))
	if err != nil {
		return "", time.Time{}, fmt.Errorf("sign the JWT-SVID of %s: %w", req.SPIFFEID, err)
	}
	token = input + "." + base64.RawURLEncoding.EncodeToString(signature)
	if len(token) > svid.MaxJWTBytes {
		return "", time.Time{}, invalid("audience", "makes a token of %d bytes; validators read %d", len(token), svid.MaxJWTBytes)
	}
	return token, exp, nil
}

// ready is what issuing needs besides the request; it is made once.
func (a *JWTAuthority) ready() error {
	if a == nil || a.KeyID == "" || a.Signer == nil || a.TrustDomain.IsZero() {
		return errors.New("issue a JWT-SVID: authority is incomplete")
	}
	a.once.Do(func() {
		if a.head, a.key, a.fault = a.prepare(); a.fault != nil {
			a.fault = fmt.Errorf("issue a JWT-SVID: %w", a.fault)
		}
	})
	return a.fault
}

// Fault says why the authority signs nothing: it is incomplete, or ErrFaultyKey.
func (a *JWTAuthority) Fault() error {
	if err := a.ready(); err != nil {
		return err
	}
	return a.key.fault()
}

func (a *JWTAuthority) prepare() (string, *signing, error) {
	alg, err := JWSAlgorithm(a.Signer.Public())
	if err != nil {
		return "", nil, err
	}
	head, err := json.Marshal(jwtHeader{Alg: alg, Kid: a.KeyID, Typ: "JWT"})
	if err != nil {
		return "", nil, fmt.Errorf("encode the header: %w", err)
	}
	key, err := newSigning(a.Signer)
	return base64.RawURLEncoding.EncodeToString(head) + ".", key, err
}

// JWSAlgorithm is the one of RFC 7518 §3.1 that a JWT key signs with; other keys
// are none.
func JWSAlgorithm(pub crypto.PublicKey) (string, error) {
	switch key := pub.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() {
			return "ES256", nil
		}
	case *rsa.PublicKey:
		if key.N.BitLen() >= 2048 {
			return "RS256", nil
		}
	}
	return "", errors.New("the key is neither a P-256 key, for ES256, nor an RSA key of 2048 bits or more, for RS256")
}

func (a *JWTAuthority) check(req JWTRequest) error {
	if err := a.ready(); err != nil {
		return err
	}
	if err := checkSubject(req.SPIFFEID, a.TrustDomain); err != nil {
		return err
	}
	if err := checkSerial(req.Serial); err != nil {
		return err
	}
	if err := checkLifetime(req.TTL, req.Now); err != nil {
		return err
	}
	switch n := len(req.Audience); {
	case n == 0:
		return invalid("audience", "is missing")
	case n > MaxJWTAudiences:
		return invalid("audience", "has %d elements; at most %d are signed", n, MaxJWTAudiences)
	}
	for _, aud := range req.Audience {
		if aud == "" {
			return invalid("audience", "has an empty element")
		}
		if err := checkText(aud); err != nil {
			return invalid("audience", "%q: %v", aud, err)
		}
	}
	return nil
}

// signJWS signs as RFC 7518 §3.3 and §3.4 say: an RSA signature as it is, of ECDSA
// on P-256 the two integers, 32 octets each.
func (s *signing) signJWS(message []byte) ([]byte, error) {
	signature, err := s.sign(message)
	if _, ok := s.signer.Public().(*ecdsa.PublicKey); err != nil || !ok {
		return signature, err
	}
	var r, t big.Int
	der := cryptobyte.String(signature)
	if !der.ReadASN1(&der, cryptobyte_asn1.SEQUENCE) || !der.ReadASN1Integer(&r) || !der.ReadASN1Integer(&t) || r.BitLen() > 256 || t.BitLen() > 256 {
		return nil, errors.New("the signer gave something else than a signature")
	}
	out := make([]byte, 64)
	r.FillBytes(out[:32])
	t.FillBytes(out[32:])
	return out, nil
}

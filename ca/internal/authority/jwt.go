// Issues JWT-SVIDs: headers alg, kid and typ and no others (J2), aud always an
// array (J13), jti the serial number, so that a revocation reaches them too.

package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

// MaxJWTAudiences is how many audiences one token may have. The standard advises
// one (J7).
const MaxJWTAudiences = 8

// JWTAuthority signs JWT-SVIDs with ES256. It is immutable and safe for concurrent
// use as far as Signer is.
type JWTAuthority struct {
	TrustDomain spiffeid.TrustDomain
	KeyID       string
	Signer      crypto.Signer // P-256
}

// JWTRequest asks for a JWT-SVID.
type JWTRequest struct {
	SPIFFEID spiffeid.ID
	Audience []string // at least one
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
	head, err := json.Marshal(jwtHeader{Alg: "ES256", Kid: a.KeyID, Typ: "JWT"})
	if err != nil {
		return "", time.Time{}, fmt.Errorf("encode the JWT-SVID of %s: %w", req.SPIFFEID, err)
	}
	claims, err := json.Marshal(jwtClaims{
		Aud: req.Audience, Exp: exp.Unix(), Iat: req.Now.Unix(), Jti: req.Serial.String(), Sub: req.SPIFFEID.String(),
	})
	if err != nil {
		return "", time.Time{}, fmt.Errorf("encode the JWT-SVID of %s: %w", req.SPIFFEID, err)
	}
	input := base64.RawURLEncoding.EncodeToString(head) + "." + base64.RawURLEncoding.EncodeToString(claims)
	signature, err := SignES256(a.Signer, []byte(input))
	if err != nil {
		return "", time.Time{}, fmt.Errorf("sign the JWT-SVID of %s: %w", req.SPIFFEID, err)
	}
	token = input + "." + base64.RawURLEncoding.EncodeToString(signature)
	if len(token) > svid.MaxJWTBytes {
		return "", time.Time{}, invalid("audience", "makes a token of %d bytes; validators read %d", len(token), svid.MaxJWTBytes)
	}
	return token, exp, nil
}

func (a *JWTAuthority) check(req JWTRequest) error {
	if a == nil || a.KeyID == "" || a.Signer == nil || a.TrustDomain.IsZero() {
		return errors.New("issue a JWT-SVID: authority is incomplete")
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

// SignES256 signs as RFC 7518 §3.4 says: the two integers of the signature, 32
// octets each. The signature is checked before it is given out, since a faulty one
// can betray the key.
func SignES256(signer crypto.Signer, message []byte) ([]byte, error) {
	pub, ok := signer.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("the key is not a P-256 key, which ES256 needs")
	}
	digest := sha256.Sum256(message)
	der, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	if !ecdsa.VerifyASN1(pub, digest[:], der) {
		return nil, errors.New("the signer gave a wrong signature")
	}
	var parts struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &parts); err != nil {
		return nil, fmt.Errorf("read the signature: %w", err)
	}
	out := make([]byte, 64)
	parts.R.FillBytes(out[:32])
	parts.S.FillBytes(out[32:])
	return out, nil
}

// Judges a JWT-SVID by SECURITY.md J1-J13. go-spiffe v2.9.0 takes extra headers
// (jku among them), a sub without a path and a token that ran out 50 s ago, and
// cannot be told the time, so the rules are held here and go-jose checks only the
// signature.

package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	// MaxJWTBytes is the size of the largest token that is looked at.
	MaxJWTBytes = 16 << 10
	// JWTLeeway is how far exp, nbf and iat may be off, for clocks that differ.
	JWTLeeway = 10 * time.Second
)

// JWT is what a verified JWT-SVID says. It is read-only.
type JWT struct {
	ID        spiffeid.ID
	Audience  []string
	Expiry    time.Time
	KeyID     string    // of the JWT authority that signed it
	IssuedAt  time.Time // zero when the token does not say
	Serial    Serial    // from jti; meaningful when OurSerial
	OurSerial bool
	SerialHex string // the jti as it stands when OurSerial
	// Claims are all of them as encoding/json gives them: float64, string, bool,
	// nil, []any, map[string]any.
	Claims map[string]any
}

// VerifyJWT checks a token in JWS compact serialization against the JWT keys of
// its subject's trust domain, at the time now. It has to be meant for at least one
// of audience; an empty audience accepts nothing. The error is an *Error.
func VerifyJWT(token string, bundles jwtbundle.Source, audience []string, now time.Time) (*JWT, error) {
	parts, err := splitCompact(token)
	if err != nil {
		return nil, err
	}
	head, err := parseHeader(parts[0])
	if err != nil {
		return nil, err
	}
	claims, err := parseClaims(parts[1])
	if err != nil {
		return nil, err
	}
	id, err := subjectID(claims)
	if err != nil {
		return nil, err
	}
	if bundles == nil {
		return nil, refuse("J12", "there is no source of trust bundles")
	}
	bundle, err := bundles.GetJWTBundleForTrustDomain(id.TrustDomain())
	if err != nil {
		return nil, &Error{Rule: "J12", Reason: "no trust bundle for " + id.TrustDomain().IDString(), Err: err}
	}
	if bundle == nil || bundle.TrustDomain() != id.TrustDomain() {
		return nil, refuse("J12", "the source of trust bundles answered with one of another trust domain")
	}
	key, ok := bundle.FindJWTAuthority(head.kid)
	if !ok {
		return nil, refuse("J12", "%s has no jwt-svid key with the ID %q", id.TrustDomain().IDString(), head.kid)
	}
	if err := checkSignature(token, head.alg, key); err != nil {
		return nil, err
	}
	return checkClaims(id, head.kid, claims, audience, now)
}

// splitCompact: three base64url parts and nothing else (J1). The JSON
// serialization, JWE, padding and white space fall here.
func splitCompact(token string) ([][]byte, error) {
	if len(token) > MaxJWTBytes {
		return nil, refuse("CAP", "the token has %d bytes; at most %d are looked at", len(token), MaxJWTBytes)
	}
	if strings.Count(token, ".") != 2 {
		return nil, refuse("J1", "the token is not a JWS in compact serialization")
	}
	var parts [][]byte
	for text := range strings.SplitSeq(token, ".") {
		// The decoder skips line ends, so they are looked for first.
		if strings.ContainsAny(text, "\r\n") {
			return nil, refuse("J1", "the token has white space in it")
		}
		part, err := base64.RawURLEncoding.Strict().DecodeString(text)
		if err != nil {
			return nil, &Error{Rule: "J1", Reason: "a part of the token is not base64url", Err: err}
		}
		if len(part) == 0 {
			return nil, refuse("J1", "a part of the token is empty")
		}
		parts = append(parts, part)
	}
	return parts, nil
}

type header struct {
	alg jose.SignatureAlgorithm
	kid string
}

var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512,
	jose.ES256, jose.ES384, jose.ES512,
	jose.PS256, jose.PS384, jose.PS512,
}

func parseHeader(text []byte) (header, error) {
	fields, err := parseObject(text)
	if err != nil {
		return header{}, &Error{Rule: "J1", Reason: "the header does not parse", Err: err}
	}
	for name := range fields {
		if name != "alg" && name != "kid" && name != "typ" {
			return header{}, refuse("J2", "the header has %q; only alg, kid and typ are allowed", name)
		}
	}
	alg, _ := fields["alg"].(string)
	if !slices.Contains(algorithms, jose.SignatureAlgorithm(alg)) {
		return header{}, refuse("J3", "the signature algorithm %q is not one of RS, ES, PS with 256, 384, 512", alg)
	}
	if typ, present := fields["typ"]; present && typ != "JWT" && typ != "JOSE" {
		return header{}, refuse("J4", "the header's typ is neither JWT nor JOSE")
	}
	kid, _ := fields["kid"].(string)
	if kid == "" {
		return header{}, refuse("J11", "the header has no kid")
	}
	return header{jose.SignatureAlgorithm(alg), kid}, nil
}

func parseClaims(text []byte) (map[string]any, error) {
	claims, err := parseObject(text)
	if err != nil {
		return nil, &Error{Rule: "J9", Reason: "the claims do not parse", Err: err}
	}
	return claims, nil
}

func subjectID(claims map[string]any) (spiffeid.ID, error) {
	sub, ok := claims["sub"].(string)
	if !ok {
		return spiffeid.ID{}, refuse("J5", "sub is missing or no string")
	}
	if len(sub) > MaxIDBytes {
		return spiffeid.ID{}, refuse("ID6", "the SPIFFE ID has %d bytes; the longest has %d", len(sub), MaxIDBytes)
	}
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return spiffeid.ID{}, &Error{Rule: "J5", Reason: fmt.Sprintf("sub %q is not a SPIFFE ID", sub), Err: err}
	}
	if id.Path() == "" {
		return spiffeid.ID{}, refuse("J5", "sub %q has no path: that names a trust domain, not a workload", sub)
	}
	if len(id.TrustDomain().Name()) > 255 {
		return spiffeid.ID{}, refuse("ID7", "the trust domain name has more than 255 bytes")
	}
	return id, nil
}

func checkSignature(token string, alg jose.SignatureAlgorithm, key crypto.PublicKey) error {
	if err := checkAlgorithmFits(alg, key); err != nil {
		return refuse("J3", "%v", err)
	}
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return &Error{Rule: "J1", Reason: "the token does not parse", Err: err}
	}
	if _, err := jws.Verify(key); err != nil {
		return &Error{Rule: "J12", Reason: "the signature is not by the key that kid names", Err: err}
	}
	return nil
}

// checkAlgorithmFits ties the algorithm to the key, as RFC 7518 §3 does: ES256 is
// P-256 and nothing else. Which one applies is thereby the key's choice, not the
// token's (T24).
func checkAlgorithmFits(alg jose.SignatureAlgorithm, key crypto.PublicKey) error {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		want := map[int]jose.SignatureAlgorithm{256: jose.ES256, 384: jose.ES384, 521: jose.ES512}[key.Curve.Params().BitSize]
		if alg != want {
			return fmt.Errorf("the algorithm %s does not fit a key on curve %s", alg, key.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if !strings.HasPrefix(string(alg), "RS") && !strings.HasPrefix(string(alg), "PS") {
			return fmt.Errorf("the algorithm %s does not fit an RSA key", alg)
		}
	}
	return CheckJWTKey(key)
}

func checkClaims(id spiffeid.ID, kid string, claims map[string]any, audience []string, now time.Time) (*JWT, error) {
	aud, err := audiences(claims)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(aud, func(a string) bool { return slices.Contains(audience, a) }) {
		return nil, refuse("J6", "the token is meant for %q, not for %q", aud, audience)
	}
	exp, iat, err := checkTimes(claims, now)
	if err != nil {
		return nil, err
	}
	out := &JWT{ID: id, Audience: aud, Expiry: exp, KeyID: kid, IssuedAt: iat}
	if jti, ok := claims["jti"].(string); ok {
		if out.Serial, out.OurSerial = serialFromHex(jti); out.OurSerial {
			out.SerialHex = jti
		}
	}
	plain, err := plainNumbers(claims)
	if err != nil {
		return nil, &Error{Rule: "J9", Reason: "a claim is a number too large", Err: err}
	}
	out.Claims, _ = plain.(map[string]any)
	return out, nil
}

// audiences reads aud: a string, or an array of strings (J6, J13).
func audiences(claims map[string]any) ([]string, error) {
	var aud []string
	switch v := claims["aud"].(type) {
	case string:
		aud = []string{v}
	case []any:
		for _, element := range v {
			s, ok := element.(string)
			if !ok {
				return nil, refuse("J6", "an element of aud is no string")
			}
			aud = append(aud, s)
		}
	default:
		return nil, refuse("J6", "aud is missing, or neither a string nor an array")
	}
	if len(aud) == 0 || slices.Contains(aud, "") {
		return nil, refuse("J6", "aud is empty")
	}
	return aud, nil
}

func checkTimes(claims map[string]any, now time.Time) (exp, iat time.Time, err error) {
	zero := time.Time{}
	exp, present, err := numericDate(claims, "exp")
	if err != nil {
		return zero, zero, &Error{Rule: "J8", Reason: "exp", Err: err}
	}
	if !present {
		return zero, zero, refuse("J8", "exp is missing")
	}
	if now.IsZero() {
		return zero, zero, refuse("J8", "the current time is not known")
	}
	if !now.Add(-JWTLeeway).Before(exp) {
		return zero, zero, &Error{Rule: "J8", Reason: "the token expired at " + exp.Format(time.RFC3339), expired: true}
	}
	for _, name := range []string{"nbf", "iat"} {
		at, present, err := numericDate(claims, name)
		if err != nil {
			return zero, zero, &Error{Rule: "J9", Reason: name, Err: err}
		}
		if present && at.After(now.Add(JWTLeeway)) {
			return zero, zero, &Error{Rule: "J9", Reason: name + " lies in the future: " + at.Format(time.RFC3339), expired: true}
		}
		if name == "iat" {
			iat = at
		}
	}
	return exp, iat, nil
}

// maxNumericDate is the end of the year 9999, the last that RFC 3339 can write.
const maxNumericDate = 253402300799

// numericDate reads whole seconds. RFC 7519 allows fractions; no issuer of
// JWT-SVIDs needs them, and every reader rounds them its own way.
func numericDate(claims map[string]any, name string) (at time.Time, present bool, err error) {
	value, present := claims[name]
	if !present {
		return time.Time{}, false, nil
	}
	number, ok := value.(json.Number)
	if !ok {
		return time.Time{}, true, errors.New("not a number")
	}
	seconds, err := strconv.ParseInt(number.String(), 10, 64)
	if err != nil || seconds < 0 || seconds > maxNumericDate {
		return time.Time{}, true, fmt.Errorf("%.40q is not a time in whole seconds", number.String())
	}
	return time.Unix(seconds, 0).UTC(), true, nil
}

// plainNumbers turns json.Number into float64, in place.
func plainNumbers(value any) (any, error) {
	var err error
	switch v := value.(type) {
	case json.Number:
		return v.Float64()
	case []any:
		for i := range v {
			if v[i], err = plainNumbers(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for name := range v {
			if v[name], err = plainNumbers(v[name]); err != nil {
				return nil, err
			}
		}
	}
	return value, nil
}

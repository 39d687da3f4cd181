// What a token must be, whoever its issuer is. go-jose checks the signature; its
// json refuses claims that are there twice, and does not fold their case.

package oidc

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json"
)

const (
	maxTokenBytes   = 16 << 10
	maxKeyIDBytes   = 256
	maxSubjectBytes = 255 // OpenID Connect Core §2
	minRSABits      = 2048
	maxRSABits      = 8192
	// leeway is how far exp, nbf and iat may be off, for clocks that differ.
	leeway = 10 * time.Second
	// maxLife is how far exp may lie ahead: a bearer token that was lost should
	// not count for longer.
	maxLife = 24 * time.Hour
	maxTime = 253402300799 // the end of the year 9999
)

// algorithms are what providers sign with. Which of them counts is a matter of
// the key.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256}

// unverified is a token as it stands: what it says is good for finding the key.
type unverified struct {
	jws         *jose.JSONWebSignature
	issuer, kid string
}

func parse(token string) (unverified, error) {
	if len(token) > maxTokenBytes {
		return unverified{}, fmt.Errorf("it has more than %d bytes", maxTokenBytes)
	}
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return unverified{}, errors.New("it is not a JWT signed with RS256 or ES256")
	}
	head := jws.Signatures[0].Protected
	for name := range head.ExtraHeaders {
		switch name {
		case "jku", "x5u", "crit", "b64":
			return unverified{}, fmt.Errorf("its header has %s", name)
		}
	}
	if head.JSONWebKey != nil {
		return unverified{}, errors.New("its header brings a key of its own")
	}
	if typ, present := head.ExtraHeaders["typ"]; present && typ != "JWT" && typ != "at+jwt" {
		// A logout token, say, is signed by the same key for another end.
		return unverified{}, errors.New("its typ is neither JWT nor at+jwt")
	}
	if head.KeyID == "" || len(head.KeyID) > maxKeyIDBytes {
		return unverified{}, errors.New("its header has no kid, or a long one")
	}
	var claims map[string]any
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &claims); err != nil {
		return unverified{}, errors.New("its claims are not one JSON object in which each name is there once")
	}
	iss, _ := claims["iss"].(string)
	return unverified{jws, iss, head.KeyID}, nil
}

// verify returns the claims if key signed them.
func (t unverified) verify(key crypto.PublicKey) (map[string]any, error) {
	if alg := jose.SignatureAlgorithm(t.jws.Signatures[0].Protected.Algorithm); alg != algorithmOf(key) {
		return nil, fmt.Errorf("it is signed with %s, which is not what its key is for", alg)
	}
	payload, err := t.jws.Verify(key)
	if err != nil {
		return nil, errors.New("its signature is not by the key that it names")
	}
	var claims map[string]any
	if err := json.Unmarshal(payload, &claims); err != nil {
		return nil, errors.New("its claims do not parse")
	}
	return claims, nil
}

// algorithmOf is the one algorithm that key signs with; empty: the key is of no
// use.
func algorithmOf(key crypto.PublicKey) jose.SignatureAlgorithm {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits >= minRSABits && bits <= maxRSABits {
			return jose.RS256
		}
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() {
			return jose.ES256
		}
	}
	return ""
}

// judge says who holds a token with these claims, which the issuer signed.
func (i Issuer) judge(claims map[string]any, now time.Time) (Identity, error) {
	if claims["iss"] != i.URL {
		return Identity{}, errors.New("its issuer is not configured")
	}
	if !meantFor(claims["aud"], i.Audience) {
		return Identity{}, fmt.Errorf("it is not meant for %q alone", i.Audience)
	}
	sub, _ := claims["sub"].(string)
	if sub == "" || len(sub) > maxSubjectBytes || strings.ContainsFunc(sub, unprintable) {
		return Identity{}, fmt.Errorf("its sub is not 1 to %d printable ASCII characters", maxSubjectBytes)
	}
	exp, err := checkTimes(claims, now)
	if err != nil {
		return Identity{}, err
	}
	roles, matched := i.matching(claims)
	return Identity{Issuer: i.URL, Subject: sub, Expiry: exp, Roles: roles, Matched: matched}, nil
}

func unprintable(r rune) bool { return r < ' ' || r > '~' }

// meantFor: one that is meant for others too, each of them could show here.
func meantFor(aud any, want string) bool {
	if list, ok := aud.([]any); ok && len(list) == 1 {
		aud = list[0]
	}
	return aud == want
}

func checkTimes(claims map[string]any, now time.Time) (exp time.Time, err error) {
	exp, present, err := seconds(claims, "exp")
	switch {
	case err != nil:
		return exp, err
	case !present:
		return exp, errors.New("it has no exp")
	case !now.Add(-leeway).Before(exp):
		return exp, errors.New("it has expired")
	case exp.After(now.Add(maxLife + leeway)):
		return exp, fmt.Errorf("it lives for more than %s from now", maxLife)
	}
	for _, name := range []string{"nbf", "iat"} {
		at, _, err := seconds(claims, name)
		if err != nil {
			return exp, err
		}
		if at.After(now.Add(leeway)) {
			return exp, fmt.Errorf("its %s lies in the future", name)
		}
	}
	return exp, nil
}

// seconds reads a NumericDate; a fraction is cut off.
func seconds(claims map[string]any, name string) (at time.Time, present bool, err error) {
	value, present := claims[name]
	if !present {
		return time.Time{}, false, nil
	}
	n, ok := value.(float64)
	if !ok || n < 0 || n > maxTime {
		return time.Time{}, true, fmt.Errorf("its %s is not a time", name)
	}
	return time.Unix(int64(n), 0), true, nil
}

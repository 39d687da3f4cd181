// Forged JWT-SVIDs: any header, any claims, any key.

package forge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"time"
)

// Fields changes members of a header or of claims: a nil value removes one, a
// json.RawMessage is written as it is.
type Fields map[string]any

// Header is the sound header of a JWT-SVID, changed.
func (a *Authority) Header(changes Fields) Fields {
	return merge(Fields{"alg": "ES256", "kid": a.KeyID, "typ": "JWT"}, changes)
}

// Claims are the sound claims of a JWT-SVID for trust domain + path and the
// audience "aud", changed.
func (a *Authority) Claims(path string, changes Fields) Fields {
	now := time.Now()
	return merge(Fields{
		"sub": "spiffe://" + a.TrustDomain.Name() + path,
		"aud": []string{"aud"},
		"exp": now.Add(5 * time.Minute).Unix(),
		"iat": now.Unix(),
		"jti": newSerial(a.tb).String(),
	}, changes)
}

func merge(base, changes Fields) Fields {
	maps.Copy(base, changes)
	maps.DeleteFunc(base, func(_ string, v any) bool { return v == nil })
	return base
}

// JWT signs a header and claims with the trust domain's JWT key.
func (a *Authority) JWT(header, claims Fields) string {
	a.tb.Helper()
	return a.Token(a.JWTKey, a.encode(header), a.encode(claims))
}

// Token signs these very bytes with ES256 by any P-256 key.
func (a *Authority) Token(key crypto.Signer, header, claims []byte) string {
	a.tb.Helper()
	token, err := Sign(key, header, claims)
	if err != nil {
		a.tb.Fatal(err)
	}
	return token
}

// Sign makes a token of these very bytes with ES256 by any P-256 key.
func Sign(key crypto.Signer, header, claims []byte) (string, error) {
	input := encode(header) + "." + encode(claims)
	digest := sha256.Sum256([]byte(input))
	der, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return "", err
	}
	var sig struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &sig); err != nil {
		return "", err
	}
	raw := make([]byte, 64)
	sig.R.FillBytes(raw[:32])
	sig.S.FillBytes(raw[32:])
	return input + "." + encode(raw), nil
}

// HMACToken signs with HS256 and the public JWT key as the secret, the classic
// confusion of algorithms.
func (a *Authority) HMACToken(header, claims Fields) string {
	a.tb.Helper()
	secret, err := a.JWTKey.Public().(*ecdsa.PublicKey).Bytes()
	if err != nil {
		a.tb.Fatal(err)
	}
	input := encode(a.encode(header)) + "." + encode(a.encode(claims))
	mac := hmac.New(sha256.New, secret)
	fmt.Fprint(mac, input)
	return input + "." + encode(mac.Sum(nil))
}

func (a *Authority) encode(fields Fields) []byte {
	a.tb.Helper()
	text, err := json.Marshal(fields)
	if err != nil {
		a.tb.Fatal(err)
	}
	return text
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

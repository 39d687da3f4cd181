// Documents that the implementation has issued: certificates and tokens, held against
// what the standards ask of issuers.

package main

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/integration/conform/jwtcase"
	"merlon.dev/sdk/svid/forge"
)

// extensionOf gives whether an extension is there, and critical.
func extensionOf(c *x509.Certificate, oid asn1.ObjectIdentifier) (there, critical bool) {
	for _, ext := range c.Extensions {
		if ext.Id.Equal(oid) {
			return true, ext.Critical
		}
	}
	return false, false
}

// failIf is an error if bad.
func failIf(bad bool, format string, args ...any) error {
	if !bad {
		return nil
	}
	return fmt.Errorf(format, args...)
}

// checkLeaf holds an X509-SVID against the standard.
func checkLeaf(r *report, c *x509.Certificate, id spiffeid.ID) {
	r.check("X1", issuer, failIf(len(c.URIs) != 1, "an X509-SVID has %d URI SANs", len(c.URIs)))
	r.check("X3", issuer, failIf(id.Path() == "", "%s has no path", id))
	for _, row := range []string{"ID1", "ID2", "ID3", "ID5"} {
		r.check(row, issuer, failIf(len(c.URIs) == 1 && c.URIs[0].String() != id.String(), "the X509-SVID of %s says %v", id, c.URIs))
	}
	if len(id.String()) == 2048 {
		r.ok("ID6", issuer)
	}
	_, sanCritical := extensionOf(c, forge.SubjectAltName)
	r.check("X5", issuer, failIf(len(c.RawSubject) <= 2 && !sanCritical, "the subject of %s is empty and the SAN not critical", id))
	_, bcCritical := extensionOf(c, forge.BasicConstraints)
	r.check("X8", issuer, failIf(c.IsCA || !c.BasicConstraintsValid || !bcCritical, "basicConstraints of %s: valid %t, cA %t, critical %t", id, c.BasicConstraintsValid, c.IsCA, bcCritical))
	there, critical := extensionOf(c, forge.KeyUsage)
	r.check("X10", issuer, failIf(!there || !critical, "keyUsage of %s: there %t, critical %t", id, there, critical))
	r.check("X11", issuer, failIf(c.KeyUsage&x509.KeyUsageDigitalSignature == 0 || c.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0, "keyUsage of %s is %b", id, c.KeyUsage))
	both := slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	r.check("X12", issuer, failIf(!both, "extended key usage of %s is %v", id, c.ExtKeyUsage))
}

// checkSigning holds a signing certificate, of a chain or a bundle, against the
// standard.
func checkSigning(r *report, c *x509.Certificate, td spiffeid.TrustDomain) {
	who := fmt.Sprintf("the signing certificate of %q", c.Subject)
	r.check("X8", issuer, failIf(!c.IsCA || !c.BasicConstraintsValid, "%s does not say that cA is true", who))
	there, critical := extensionOf(c, forge.KeyUsage)
	r.check("X10", issuer, failIf(!there || !critical, "keyUsage of %s: there %t, critical %t", who, there, critical))
	r.check("X11", issuer, failIf(c.KeyUsage&x509.KeyUsageCertSign == 0, "%s has no keyCertSign", who))
	r.check("X6", issuer, failIf(len(c.URIs) != 1 || c.URIs[0].String() != td.IDString(), "%s has the URIs %v, not %s", who, c.URIs, td.IDString()))
	path := len(c.URIs) > 0 && c.URIs[0].Path != ""
	r.check("ID9", issuer, failIf(path, "%s has a SPIFFE ID with a path, %v", who, c.URIs))
}

// checkToken holds a JWT-SVID against the standard.
func checkToken(r *report, token, id string, now time.Time) {
	parts := strings.Split(token, ".")
	r.check("J1", issuer, failIf(len(parts) != 3, "a JWT-SVID has %d parts", len(parts)))
	if len(parts) != 3 {
		return
	}
	var head, claims map[string]any
	if err := errors.Join(decodePart(parts[0], &head), decodePart(parts[1], &claims)); err != nil {
		r.check("J1", issuer, err)
		return
	}
	for name := range head {
		r.check("J2", issuer, failIf(!slices.Contains([]string{"alg", "kid", "typ"}, name), "a JWT-SVID has the header %s", name))
	}
	alg, _ := head["alg"].(string)
	algorithms := []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}
	r.check("J3", issuer, failIf(!slices.Contains(algorithms, alg), "alg is %v", head["alg"]))
	typ, ok := head["typ"]
	r.check("J4", issuer, failIf(ok && typ != "JWT" && typ != "JOSE", "typ is %v", typ))
	r.check("J5", issuer, failIf(claims["sub"] != id, "sub is %v, and the answer says %s", claims["sub"], id))
	aud, single := claims["aud"].([]any)
	if !single {
		aud = []any{claims["aud"]}
	}
	r.check("J6", issuer, failIf(!slices.Contains(aud, any(jwtcase.Audience)), "aud is %v", claims["aud"]))
	r.check("J7", issuer, failIf(len(aud) != 1, "%d audiences where one was asked for", len(aud)))
	r.check("J13", issuer, failIf(!single, "aud is a text, which is allowed; a list is what others write"))
	exp, ok := claims["exp"].(float64)
	r.check("J8", issuer, failIf(!ok || int64(exp) <= now.Unix(), "exp is %v", claims["exp"]))
}

func decodePart(part string, to any) error {
	text, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return fmt.Errorf("a JWT-SVID's part: %w", err)
	}
	if err := json.Unmarshal(text, to); err != nil {
		return fmt.Errorf("a JWT-SVID's part: %w", err)
	}
	return nil
}

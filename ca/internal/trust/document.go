// Trust bundle documents as they come from others: JWKS as SPIFFE Trust Domain
// and Bundle has it, or X.509 authorities in PEM. What the standard says to ignore
// is ignored and named; everything else that is odd is refused whole, so that what
// was known stays. Nothing of the text survives but keys and sequence number.

package trust

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json" // refuses names that are there twice, and does not fold their case
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/authority"
	"merlon.dev/sdk/svid"
)

// Limits of a document. Each X.509 authority can cost whoever verifies a chain a
// signature check, and all of it lies in the memory of every agent concerned.
const (
	MaxDocumentBytes = 256 << 10
	maxKeysOfAKind   = 64
	maxKeysNamed     = 1024 // usable or not
	maxKeyIDBytes    = 256
	maxHintSeconds   = 24 * 60 * 60 // a longer one says nothing that should be followed
)

// The uses of keys (SPIFFE Trust Domain and Bundle §4.2.2). They are compared by
// case.
const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
)

// curves are those by which JWT-SVIDs are signed (JWT-SVID §2.1, by RFC 7518 §3.1). A
// JWT key of another one, which no verifier could use, leaves the others as they are:
// what they withdraw has to come through.
var curves = []string{"P-256", "P-384", "P-521"}

// Document is what a trust domain's keys are. The zero value vouches for nobody.
type Document struct {
	// Sequence is 0 where the document has none.
	Sequence uint64
	// RefreshHint is how often whoever polls should; 0 where the document does not
	// say. It is not kept.
	RefreshHint time.Duration
	X509        []*x509.Certificate // each once, in the document's order
	JWT         map[string]crypto.PublicKey
	// Ignored says of each key that the standard has us ignore, why.
	Ignored []string
}

// ParseDocument reads a document of trust domain td: JWKS where it begins with a
// brace, PEM otherwise. Certificates that name another trust domain, or that are
// marked as a development root's, are refused.
func ParseDocument(td spiffeid.TrustDomain, text []byte) (*Document, error) {
	if len(text) > MaxDocumentBytes {
		return nil, fmt.Errorf("it has %d bytes; at most %d", len(text), MaxDocumentBytes)
	}
	trimmed := bytes.TrimSpace(text)
	d := &Document{JWT: make(map[string]crypto.PublicKey)}
	var err error
	switch {
	case len(trimmed) == 0:
		err = errors.New("it is empty")
	case trimmed[0] == '{':
		err = d.parseJWKS(td, trimmed)
	default:
		err = d.parsePEM(td, trimmed)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// jwks has the parameters that mean something here; others may be there (§4.1, B1).
type jwks struct {
	Sequence *uint64         `json:"spiffe_sequence"`
	Hint     json.RawMessage `json:"spiffe_refresh_hint"`
	Keys     json.RawMessage `json:"keys"`
}

// jwk is a key as far as it says what it is for. No private part has a place in
// a trust bundle.
type jwk struct {
	KeyType string   `json:"kty"`
	Curve   string   `json:"crv"`
	Use     string   `json:"use"`
	KeyID   string   `json:"kid"`
	X5C     []string `json:"x5c"`
	D       any      `json:"d"`
}

func (d *Document) parseJWKS(td spiffeid.TrustDomain, text []byte) error {
	var doc jwks
	if err := json.Unmarshal(text, &doc); err != nil {
		return fmt.Errorf("it is not a JWKS document: %v", err)
	}
	if doc.Keys == nil {
		return errors.New(`it has no "keys" (an empty list means that nobody is trusted)`)
	}
	// null is how go-spiffe, and so SPIRE, writes the empty list (§4.1.3): whoever
	// refused it would go on trusting what was withdrawn.
	var keys []json.RawMessage
	if err := json.Unmarshal(doc.Keys, &keys); err != nil {
		return fmt.Errorf("its keys are no list: %v", err)
	}
	if n := len(keys); n > maxKeysNamed {
		return fmt.Errorf("it has %d keys; at most %d", n, maxKeysNamed)
	}
	if doc.Sequence != nil {
		d.Sequence = *doc.Sequence
	}
	if d.Sequence == math.MaxUint64 {
		return errors.New("its sequence number is the last that there is: nothing could follow")
	}
	// A hint that makes no sense hints at nothing.
	if seconds, err := strconv.ParseUint(string(doc.Hint), 10, 32); err == nil && seconds <= maxHintSeconds {
		d.RefreshHint = time.Duration(seconds) * time.Second
	}
	for i, raw := range keys {
		if err := d.addJWK(td, i, raw); err != nil {
			return fmt.Errorf("keys[%d]: %w", i, err)
		}
	}
	return nil
}

func (d *Document) addJWK(td spiffeid.TrustDomain, i int, raw json.RawMessage) error {
	var k jwk
	if err := json.Unmarshal(raw, &k); err != nil {
		return fmt.Errorf("it is not a JWK: %v", err)
	}
	ignore := func(why string) error {
		d.Ignored = append(d.Ignored, fmt.Sprintf("keys[%d]: %s", i, why))
		return nil
	}
	switch {
	case k.D != nil:
		return errors.New("it is a private key: whoever made this document has given it away")
	case k.Use == "":
		return ignore("it does not say what it is for (use)")
	case k.Use != useX509 && k.Use != useJWT:
		return ignore(fmt.Sprintf("its use %.40q is not known here", k.Use))
	case k.KeyType != "EC" && k.KeyType != "RSA" && k.KeyType != "OKP":
		return ignore(fmt.Sprintf("its kty %.40q is not known here", k.KeyType))
	case k.Use == useX509 && (len(k.X5C) == 0 || k.X5C[0] == ""):
		return ignore("it has no certificate (x5c)")
	case k.Use == useJWT && k.KeyID == "":
		return ignore("it has no kid, by which a JWT-SVID would name it")
	}
	if k.Use == useJWT && (k.KeyType == "OKP" || k.KeyType == "EC" && k.Curve != "" && !slices.Contains(curves, k.Curve)) {
		return ignore(fmt.Sprintf("no JWT-SVID is signed by a key whose crv is %.40q", k.Curve))
	}
	key, err := publicKey(raw)
	if err != nil {
		return err
	}
	if k.Use == useJWT {
		return d.addJWT(k.KeyID, key)
	}
	if len(k.X5C) > 1 {
		_ = ignore("of its certificates (x5c) only the first counts")
	}
	return d.addX5C(td, k.X5C[0], key)
}

// publicKey reads the key itself, without the certificates that came with it:
// those are not trusted for being there (SECURITY.md X16).
func publicKey(raw json.RawMessage) (crypto.PublicKey, error) {
	var all map[string]any
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("it is not a JWK: %v", err)
	}
	maps.DeleteFunc(all, func(name string, _ any) bool {
		return !slices.Contains([]string{"kty", "crv", "x", "y", "n", "e"}, name)
	})
	bare, err := json.Marshal(all)
	if err != nil {
		return nil, err
	}
	var key jose.JSONWebKey
	if err := key.UnmarshalJSON(bare); err != nil {
		return nil, fmt.Errorf("the key does not parse: %v", err)
	}
	return key.Key, nil
}

func (d *Document) addJWT(kid string, key crypto.PublicKey) error {
	if len(kid) > maxKeyIDBytes {
		return fmt.Errorf("its kid has %d bytes; at most %d", len(kid), maxKeyIDBytes)
	}
	if i := strings.IndexFunc(kid, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 || !utf8.ValidString(kid) {
		return fmt.Errorf("its kid %q has characters that cannot be shown", kid) // on a terminal (SECURITY.md T36)
	}
	if err := svid.CheckJWTKey(key); err != nil {
		return err
	}
	if _, twice := d.JWT[kid]; twice {
		return fmt.Errorf("another key is called %.100q too, and a JWT-SVID says no more than that", kid)
	}
	if len(d.JWT) == maxKeysOfAKind {
		return fmt.Errorf("it is the %dth JWT key; at most %d", maxKeysOfAKind+1, maxKeysOfAKind)
	}
	d.JWT[kid] = key
	return nil
}

func (d *Document) addX5C(td spiffeid.TrustDomain, text string, key crypto.PublicKey) error {
	der, err := base64.StdEncoding.Strict().DecodeString(text) // not base64url: RFC 7517 §4.7
	if err != nil {
		return errors.New("its certificate (x5c) is not base64")
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("its certificate does not parse: %v", err)
	}
	if same, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !same.Equal(key) {
		return errors.New("its certificate is for another key")
	}
	return d.addCertificate(td, cert)
}

// addCertificate judges an X.509 authority as every verifier will.
func (d *Document) addCertificate(td spiffeid.TrustDomain, cert *x509.Certificate) error {
	if slices.ContainsFunc(d.X509, cert.Equal) {
		return nil
	}
	subject := fmt.Sprintf("the certificate of %.200q", cert.Subject)
	if err := svid.CheckAuthority(cert); err != nil {
		return fmt.Errorf("%s cannot vouch for anybody: %w", subject, err)
	}
	named, err := svid.AuthorityTrustDomain(cert)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", subject, err)
	case !named.IsZero() && named != td:
		return fmt.Errorf("%s is of trust domain %s, not of %s", subject, named, td)
	case authority.IsDevelopment(cert):
		return fmt.Errorf("%s is a development root: anybody may have its key (start the CA without development, or merlon-ca in place of merlon dev)", subject)
	case len(d.X509) == maxKeysOfAKind:
		return fmt.Errorf("it is the %dth X.509 authority; at most %d", maxKeysOfAKind+1, maxKeysOfAKind)
	}
	d.X509 = append(d.X509, cert)
	return nil
}

// parsePEM takes certificates and nothing else. Text around the blocks, as
// openssl writes it, is no part of them.
func (d *Document) parsePEM(td spiffeid.TrustDomain, text []byte) error {
	for len(text) > 0 {
		block, rest := pem.Decode(text)
		if block == nil {
			break
		}
		text = rest
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("it holds a %.40q, and only certificates have a place in a trust bundle", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fmt.Errorf("a certificate in it does not parse: %v", err)
		}
		if err := d.addCertificate(td, cert); err != nil {
			return err
		}
	}
	if strings.Contains(string(text), "-----BEGIN") {
		return errors.New("a PEM block in it is cut off or damaged")
	}
	if len(d.X509) == 0 {
		return errors.New("it is neither a JWKS document nor certificates in PEM")
	}
	return nil
}

// encode gives the document in one form, whatever it came in.
func (d *Document) encode() ([]byte, error) {
	doc := struct {
		Sequence uint64            `json:"spiffe_sequence,omitempty"`
		Keys     []jose.JSONWebKey `json:"keys"`
	}{d.Sequence, []jose.JSONWebKey{}}
	for _, cert := range d.X509 {
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: cert.PublicKey, Certificates: []*x509.Certificate{cert}, Use: useX509})
	}
	for _, kid := range slices.Sorted(maps.Keys(d.JWT)) {
		doc.Keys = append(doc.Keys, jose.JSONWebKey{Key: d.JWT[kid], KeyID: kid, Use: useJWT})
	}
	return json.Marshal(doc)
}

package bundle

// This file signs and verifies. The signature is OPA's, so that a stock OPA
// verifies it too: .signatures.json with one JWT whose payload has a digest of
// every other file. The metadata stands in .manifest, which is such a file.

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	opa "github.com/open-policy-agent/opa/v1/bundle"

	"merlon.dev/policy/engine"
)

type manifest struct {
	Revision    string           `json:"revision"`
	Roots       []string         `json:"roots"`
	RegoVersion int              `json:"rego_version"`
	Metadata    manifestMetadata `json:"metadata"`
}

type manifestMetadata struct {
	Merlon merlonMetadata `json:"merlon"`
}

type merlonMetadata struct {
	Name        string   `json:"name"`
	TrustDomain string   `json:"trust_domain"`
	Generation  uint64   `json:"generation"`
	IssuedAt    string   `json:"issued_at"`
	NotAfter    string   `json:"not_after,omitempty"`
	Audience    []string `json:"audience,omitempty"`
	// Enforcement points that know of no candidates refuse a manifest with this.
	Candidate bool `json:"candidate,omitempty"`
}

type signatures struct {
	Signatures []string `json:"signatures"`
}

type signatureHeader struct {
	Algorithm string `json:"alg"`
	KID       string `json:"kid"`
	Type      string `json:"typ,omitempty"`
}

type signaturePayload struct {
	Files    []opa.FileInfo `json:"files"`
	IssuedAt int64          `json:"iat"`
}

// Sign adds md and a signature to an unsigned bundle, which the caller has
// put through Check. signer holds a P-256 key; kid is its name.
func Sign(unsigned []byte, md Metadata, kid string, signer crypto.Signer) ([]byte, error) {
	f, err := unpack(unsigned)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{manifestName, signaturesName} {
		if _, present := f[name]; present {
			return nil, fmt.Errorf("sign policy bundle: it has %s already", name)
		}
	}
	if md.Generation == 0 || md.Name == "" || md.TrustDomain == "" || md.IssuedAt.IsZero() {
		return nil, errors.New("sign policy bundle: name, trust domain, generation and time of issue are required")
	}
	if f[manifestName], err = marshalManifest(f, md); err != nil {
		return nil, fmt.Errorf("sign policy bundle: %v", err)
	}
	token, err := signFiles(f, md.IssuedAt, kid, signer)
	if err != nil {
		return nil, fmt.Errorf("sign policy bundle: %v", err)
	}
	if f[signaturesName], err = json.Marshal(signatures{Signatures: []string{token}}); err != nil {
		return nil, fmt.Errorf("sign policy bundle: %v", err)
	}
	return pack(f)
}

func marshalManifest(f files, md Metadata) ([]byte, error) {
	m := manifest{Revision: strconv.FormatUint(md.Generation, 10), RegoVersion: 1, Metadata: manifestMetadata{Merlon: merlonMetadata{
		Name: md.Name, TrustDomain: md.TrustDomain, Generation: md.Generation,
		IssuedAt: md.IssuedAt.UTC().Format(time.RFC3339Nano), Audience: md.Audience,
		Candidate: md.Candidate,
	}}}
	if !md.NotAfter.IsZero() {
		m.Metadata.Merlon.NotAfter = md.NotAfter.UTC().Format(time.RFC3339Nano)
	}
	var err error
	if m.Roots, err = engine.Roots(f.modules()); err != nil {
		return nil, err
	}
	return json.Marshal(m)
}

func signFiles(f files, issued time.Time, kid string, signer crypto.Signer) (string, error) {
	payload := signaturePayload{IssuedAt: issued.Unix()}
	for _, name := range slices.Sorted(maps.Keys(f)) {
		sum, err := digest(name, f[name])
		if err != nil {
			return "", err
		}
		payload.Files = append(payload.Files, opa.NewFile(name, sum, opa.SHA256.String()))
	}
	header, err := json.Marshal(signatureHeader{Algorithm: "ES256", KID: kid})
	if err != nil {
		return "", err
	}
	body, err := json.Marshal(payload)
	if err != nil {
		return "", err
	}
	signed := base64.RawURLEncoding.EncodeToString(header) + "." + base64.RawURLEncoding.EncodeToString(body)
	signature, err := signES256([]byte(signed), signer)
	if err != nil {
		return "", err
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// signES256 returns the fixed-size form of RFC 7518 section 3.4.
func signES256(message []byte, signer crypto.Signer) ([]byte, error) {
	public, ok := signer.Public().(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("the policy key is not an ECDSA key on P-256")
	}
	sum := sha256.Sum256(message)
	der, err := signer.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	var rs struct{ R, S *big.Int }
	if rest, err := asn1.Unmarshal(der, &rs); err != nil || len(rest) > 0 {
		return nil, errors.New("the policy key gave a malformed signature")
	}
	out := make([]byte, 64)
	rs.R.FillBytes(out[:32])
	rs.S.FillBytes(out[32:])
	return out, nil
}

// digest is OPA's: of the bytes, but of the values for JSON.
func digest(name string, content []byte) (string, error) {
	var value any = content
	if opa.IsStructuredDoc(name) {
		value = nil
		if err := decodeJSON(content, &value); err != nil {
			return "", fmt.Errorf("%s: %v", name, err)
		}
	}
	hasher, err := opa.NewSignatureHasher(opa.SHA256)
	if err != nil {
		return "", err
	}
	sum, err := hasher.HashFile(value)
	return hex.EncodeToString(sum), err
}

// hasDigest says whether digest gives sum. What OPA hashes of JSON is its values
// written in one certain way; JSON that is written so, as ours is, needs no reading.
func hasDigest(name string, content []byte, sum string) (bool, error) {
	if raw := sha256.Sum256(content); hex.EncodeToString(raw[:]) == sum {
		return true, nil
	}
	if !opa.IsStructuredDoc(name) {
		return false, nil
	}
	got, err := digest(name, content)
	return got == sum, err
}

// Verify takes apart a signed bundle. It demands exactly one ES256 signature
// by one of keys over every file, and metadata as want says; a generation
// below want.MinGeneration is ErrOlder. The Rego is not compiled (engine.New
// does), and NotAfter is left to the engine, which checks it at each call.
func Verify(signed []byte, keys []Key, want Expect) (*Contents, error) {
	f, err := unpack(signed)
	if err != nil {
		return nil, err
	}
	if err := verifySignature(f, keys); err != nil {
		return nil, fmt.Errorf("verify policy bundle: %w", err)
	}
	c, err := contents(f)
	if err != nil {
		return nil, fmt.Errorf("verify policy bundle: %w", err)
	}
	if c.Metadata, err = readManifest(f[manifestName]); err != nil {
		return nil, fmt.Errorf("verify policy bundle: .manifest: %w", err)
	}
	md := c.Metadata
	switch {
	case want.Name != "" && md.Name != want.Name:
		return nil, fmt.Errorf("verify policy bundle: it is %q, not %q", md.Name, want.Name)
	case want.TrustDomain != "" && md.TrustDomain != want.TrustDomain:
		return nil, fmt.Errorf("verify policy bundle: it is of trust domain %q, not %q", md.TrustDomain, want.TrustDomain)
	case md.Candidate && !want.Candidate:
		return nil, fmt.Errorf("verify policy bundle: generation %d is a candidate, which is never in force", md.Generation)
	case want.Candidate && !md.Candidate:
		return nil, fmt.Errorf("verify policy bundle: generation %d is no candidate", md.Generation)
	case md.Generation < want.MinGeneration:
		return nil, fmt.Errorf("verify policy bundle: %w: generation %d, have seen %d", ErrOlder, md.Generation, want.MinGeneration)
	}
	return c, nil
}

func verifySignature(f files, keys []Key) error {
	raw, present := f[signaturesName]
	if !present {
		return errors.New("it is not signed")
	}
	var s signatures
	if err := decodeJSON(raw, &s); err != nil {
		return fmt.Errorf(".signatures.json: %v", err)
	}
	if len(s.Signatures) != 1 {
		return fmt.Errorf(".signatures.json: %d signatures, exactly one is read", len(s.Signatures))
	}
	payload, err := verifyJWT(s.Signatures[0], keys)
	if err != nil {
		return err
	}
	return verifyFiles(f, payload.Files)
}

func verifyJWT(token string, keys []Key) (*signaturePayload, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errors.New("the signature is no compact JWT")
	}
	var decoded [3][]byte
	for i, p := range parts {
		var err error
		decoded[i], err = base64.RawURLEncoding.Strict().DecodeString(p)
		if err != nil || strings.ContainsAny(p, "\r\n") { // the decoder passes over line ends
			return nil, errors.New("the signature is no base64url")
		}
	}
	var header signatureHeader
	if err := decodeJSON(decoded[0], &header); err != nil {
		return nil, fmt.Errorf("the signature's header: %v", err)
	}
	if header.Algorithm != "ES256" {
		return nil, fmt.Errorf("the signature's algorithm is %q, not ES256", header.Algorithm)
	}
	i := slices.IndexFunc(keys, func(k Key) bool { return k.KID == header.KID && k.KID != "" })
	if i < 0 {
		return nil, fmt.Errorf("it is signed by the unknown key %q", header.KID)
	}
	key := keys[i].PublicKey
	if key == nil || key.Curve != elliptic.P256() || len(decoded[2]) != 64 {
		return nil, errors.New("the signature is malformed")
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	if !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(decoded[2][:32]), new(big.Int).SetBytes(decoded[2][32:])) {
		return nil, errors.New("the signature does not fit")
	}
	var payload signaturePayload
	if err := decodeJSON(decoded[1], &payload); err != nil {
		return nil, fmt.Errorf("the signature's payload: %v", err)
	}
	return &payload, nil
}

// verifyFiles demands that listed names every file of f but the signature,
// once, with its digest, and no other.
func verifyFiles(f files, listed []opa.FileInfo) error {
	seen := map[string]bool{signaturesName: true}
	for _, info := range listed {
		content, present := f[info.Name]
		switch {
		case seen[info.Name]:
			return fmt.Errorf("file %q is signed twice", info.Name)
		case !present:
			return fmt.Errorf("file %q is signed but missing", info.Name)
		case info.Algorithm != opa.SHA256.String():
			return fmt.Errorf("file %q is hashed by %q, not SHA-256", info.Name, info.Algorithm)
		}
		seen[info.Name] = true
		same, err := hasDigest(info.Name, content, info.Hash)
		if err != nil {
			return err
		}
		if !same {
			return fmt.Errorf("file %q was changed after it was signed", info.Name)
		}
	}
	for name := range f {
		if !seen[name] {
			return fmt.Errorf("file %q is not signed", name)
		}
	}
	return nil
}

func readManifest(raw []byte) (Metadata, error) {
	if raw == nil {
		return Metadata{}, errors.New("is missing")
	}
	var m manifest
	if err := decodeJSON(raw, &m); err != nil {
		return Metadata{}, err
	}
	in := m.Metadata.Merlon
	md := Metadata{Name: in.Name, TrustDomain: in.TrustDomain, Generation: in.Generation, Audience: in.Audience, Candidate: in.Candidate}
	if md.Name == "" || md.TrustDomain == "" || md.Generation == 0 || m.Revision != strconv.FormatUint(md.Generation, 10) {
		return Metadata{}, errors.New("lacks name, trust domain or generation, or its revision is another")
	}
	var err error
	if md.IssuedAt, err = time.Parse(time.RFC3339Nano, in.IssuedAt); err != nil {
		return Metadata{}, fmt.Errorf("issued_at: %v", err)
	}
	if in.NotAfter != "" {
		if md.NotAfter, err = time.Parse(time.RFC3339Nano, in.NotAfter); err != nil {
			return Metadata{}, fmt.Errorf("not_after: %v", err)
		}
	}
	return md, nil
}

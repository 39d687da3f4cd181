// Identity documents of EC2, signed by certificates of our own: which of them
// prove a node, and that an instance attests once.

package attest

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"maps"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// region signs documents, as each of Amazon's does.
type region struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

// rsaKeys are made once: they are slow.
var rsaKeys = sync.OnceValues(func() (keys [2]*rsa.PrivateKey, err error) {
	for i := range keys {
		if keys[i], err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return keys, err
		}
	}
	return keys, nil
})

func newRegion(t testing.TB, key int, from, to time.Time) *region {
	t.Helper()
	keys, err := rsaKeys()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(int64(key) + 1), Subject: pkix.Name{Organization: []string{"Cloud"}}, NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(rand.Reader, template, template, keys[key].Public(), keys[key])
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &region{keys[key], cert}
}

func (r *region) sign(t testing.TB, signedBytes []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(signedBytes)
	signature, err := rsa.SignPKCS1v15(rand.Reader, r.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

// attributesOf are those that a signature over document has, in DER.
func attributesOf(t testing.TB, document []byte, more ...signedAttribute) []byte {
	t.Helper()
	sum := sha256.Sum256(document)
	attributes := append([]signedAttribute{attributeOf(t, oidContentType, oidData), attributeOf(t, oidMessageDigest, sum[:])}, more...)
	der, err := asn1.MarshalWithParams(attributes, "set")
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func attributeOf(t testing.TB, oid asn1.ObjectIdentifier, values ...any) signedAttribute {
	t.Helper()
	a := signedAttribute{Type: oid}
	for _, value := range values {
		der, err := asn1.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		a.Values = append(a.Values, asn1.RawValue{FullBytes: der})
	}
	return a
}

func (r *region) document(t testing.TB, fields map[string]any) AWSDocument {
	t.Helper()
	document, err := json.MarshalIndent(fields, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	attributes := attributesOf(t, document)
	return AWSDocument{Document: document, SignedAttributes: attributes, Signature: r.sign(t, attributes)}
}

var bootTime = time.Date(2026, 11, 26, 4, 0, 0, 0, time.UTC)

func ec2Fields() map[string]any {
	return map[string]any{
		"accountId": "123456789012", "region": "eu-central-1", "instanceId": "i-0123456789abcdef0", "pendingTime": bootTime.Format(time.RFC3339),
		"availabilityZone": "eu-central-1b", "imageId": "ami-0fedcba9876543210", "instanceType": "t4g.small", "architecture": "arm64",
		"billingProducts": nil, "privateIp": "10.0.0.7", "version": "2017-09-30",
	}
}

// ec2 takes what the first region signs of account 123456789012.
func ec2(t testing.TB) (*AWS, *region) {
	t.Helper()
	r := newRegion(t, 0, bootTime.Add(-time.Hour), bootTime.Add(24*time.Hour))
	return &AWS{
		TrustDomain: td, Accounts: []string{"210987654321", "123456789012"}, MaxAge: time.Hour,
		Certificates: map[string][]*x509.Certificate{"eu-central-1": {r.cert}},
	}, r
}

func TestDocumentOfAnInstanceProvesIt(t *testing.T) {
	a, r := ec2(t)
	n, err := a.Prove(r.document(t, ec2Fields()), bootTime.Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	var facts []string
	for _, sel := range n.Selectors {
		facts = append(facts, sel.String())
	}
	want := []string{"aws:account:123456789012", "aws:region:eu-central-1", "aws:zone:eu-central-1b", "aws:instance-id:i-0123456789abcdef0", "aws:instance-type:t4g.small", "aws:image-id:ami-0fedcba9876543210"}
	if n.ID.String() != "spiffe://shop.test/agent/aws/123456789012/eu-central-1/i-0123456789abcdef0" || n.Kind != "aws" || !slices.Equal(facts, want) {
		t.Errorf("the node is %s by %s with %q; want %q", n.ID, n.Kind, facts, want)
	}
	// While Amazon changes a region's certificate there are two.
	a.Certificates["eu-central-1"] = append([]*x509.Certificate{newRegion(t, 1, bootTime.Add(-time.Hour), bootTime.Add(time.Hour)).cert}, a.Certificates["eu-central-1"]...)
	if _, err := a.Prove(r.document(t, ec2Fields()), bootTime.Add(time.Minute)); err != nil {
		t.Errorf("with a second certificate of the region: %v", err)
	}
}

func TestDocumentsThatProveNothing(t *testing.T) {
	a, r := ec2(t)
	now := bootTime.Add(time.Minute)
	with := func(key string, value any) AWSDocument {
		fields := ec2Fields()
		if fields[key] = value; value == nil {
			delete(fields, key)
		}
		return r.document(t, fields)
	}
	good := r.document(t, ec2Fields())
	changed := func(change func(*AWSDocument)) AWSDocument {
		d := AWSDocument{slices.Clone(good.Document), slices.Clone(good.SignedAttributes), slices.Clone(good.Signature)}
		change(&d)
		return d
	}
	signed := func(attributes []byte) AWSDocument {
		return AWSDocument{good.Document, attributes, r.sign(t, attributes)}
	}
	notJSON := []byte("<html>")
	notJSONAttributes := attributesOf(t, notJSON)
	sum := sha256.Sum256(good.Document)
	list := func(attributes ...signedAttribute) []byte {
		der, err := asn1.MarshalWithParams(attributes, "set")
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	digestOf := attributeOf(t, oidMessageDigest, sum[:])
	for name, tc := range map[string]struct {
		d    AWSDocument
		want Reason
	}{
		"nothing":                  {AWSDocument{}, Malformed},
		"no signature":             {changed(func(d *AWSDocument) { d.Signature = nil }), Malformed},
		"too large a document":     {changed(func(d *AWSDocument) { d.Document = make([]byte, maxAWSDocument+1) }), Malformed},
		"too many attributes":      {changed(func(d *AWSDocument) { d.SignedAttributes = make([]byte, maxAWSAttributes+1) }), Malformed},
		"too large a signature":    {changed(func(d *AWSDocument) { d.Signature = make([]byte, maxAWSSignature+1) }), Malformed},
		"another key":              {newRegion(t, 1, bootTime, now).document(t, ec2Fields()), Untrusted},
		"an altered document":      {changed(func(d *AWSDocument) { d.Document[len(d.Document)-3]++ }), NotProved},
		"altered attributes":       {changed(func(d *AWSDocument) { d.SignedAttributes[len(d.SignedAttributes)-1]++ }), Untrusted},
		"an altered signature":     {changed(func(d *AWSDocument) { d.Signature[7]++ }), Untrusted},
		"no signed attributes":     {changed(func(d *AWSDocument) { d.SignedAttributes, d.Signature = nil, r.sign(t, d.Document) }), Malformed},
		"a document as attributes": {signed(good.Document), NotProved},
		"attributes as a document": {changed(func(d *AWSDocument) { d.Document = d.SignedAttributes }), NotProved},
		"something behind them":    {signed(append(slices.Clone(good.SignedAttributes), 0)), NotProved},
		"no digest":                {signed(list(attributeOf(t, oidContentType, oidData))), NotProved},
		"no content type":          {signed(list(digestOf)), NotProved},
		"another content type":     {signed(list(digestOf, attributeOf(t, oidContentType, oidContentType))), NotProved},
		"two digests":              {signed(attributesOf(t, good.Document, attributeOf(t, oidMessageDigest, make([]byte, 64)))), NotProved}, // DER has the longer one behind
		"two values of a digest":   {signed(list(attributeOf(t, oidContentType, oidData), attributeOf(t, oidMessageDigest, sum[:], make([]byte, 64)))), NotProved},
		"a digest that is text":    {signed(list(attributeOf(t, oidContentType, oidData), attributeOf(t, oidMessageDigest, "x"))), NotProved},
		"no JSON":                  {AWSDocument{notJSON, notJSONAttributes, r.sign(t, notJSONAttributes)}, Malformed},
		"another account":          {with("accountId", "999999999999"), NotAllowed},
		"an account in words":      {with("accountId", "shop"), NotProved},
		"no account":               {with("accountId", nil), NotProved},
		"no instance":              {with("instanceId", nil), NotProved},
		"an instance elsewhere":    {with("instanceId", "i-0123456789abcdef0/../i-1"), NotProved},
		"no region":                {with("region", nil), NotProved},
		"another region":           {with("region", "us-east-1"), Untrusted},
		"no start":                 {with("pendingTime", nil), NotProved},
		"a start that is no time":  {with("pendingTime", "today"), Malformed},
		"started too long ago":     {with("pendingTime", now.Add(-time.Hour-time.Second).Format(time.RFC3339)), NotAllowed},
		"started in the future":    {with("pendingTime", now.Add(maxAWSAhead+time.Second).Format(time.RFC3339)), NotAllowed},
	} {
		n, err := a.Prove(tc.d, now)
		wantRefusal(t, name, n, err, tc.want)
	}
	n, err := a.Prove(r.document(t, ec2Fields()), r.cert.NotBefore.Add(-time.Second))
	wantRefusal(t, "a certificate that is not valid yet", n, err, Untrusted)
	a.MaxAge = 48 * time.Hour
	n, err = a.Prove(r.document(t, ec2Fields()), r.cert.NotAfter.Add(time.Second))
	wantRefusal(t, "a certificate that has ended", n, err, Untrusted)
}

// Whoever changes a bit of good evidence proves nothing.
func TestTamperedDocumentProvesNothing(t *testing.T) {
	a, r := ec2(t)
	good := r.document(t, ec2Fields())
	rapid.Check(t, func(t *rapid.T) {
		parts := [][]byte{slices.Clone(good.Document), slices.Clone(good.SignedAttributes), slices.Clone(good.Signature)}
		part := parts[rapid.IntRange(0, 2).Draw(t, "part")]
		part[rapid.IntRange(0, len(part)-1).Draw(t, "byte")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		if n, err := a.Prove(AWSDocument{parts[0], parts[1], parts[2]}, bootTime); err == nil {
			t.Fatalf("it proved %s", n.ID)
		}
	})
}

func TestInstanceOfEC2AttestsOncePerStart(t *testing.T) {
	a, r := ec2(t)
	st := openStore(t)
	started := func(at time.Time) AWSDocument {
		fields := maps.Clone(ec2Fields())
		fields["pendingTime"] = at.Format(time.RFC3339)
		return r.document(t, fields)
	}
	now := bootTime.Add(10 * time.Minute)
	enroll := func(d AWSDocument) (*Agent, error) {
		n, err := a.Prove(d, now)
		if err != nil {
			t.Fatal(err)
		}
		return Enroll(t.Context(), st, n, now, now.Add(time.Hour))
	}
	used := started(bootTime)
	first, err := enroll(used)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := enroll(started(bootTime.Add(time.Minute))); !errors.Is(err, ErrAttestedOnce) {
		t.Errorf("a second agent, by a newer document: %v; want ErrAttestedOnce", err)
	}
	if _, err := Decide(t.Context(), st, first.ID, Decision{From: []Standing{Good}, To: Evicted, Now: now}); err != nil {
		t.Fatal(err)
	}
	if _, err := enroll(used); !errors.Is(err, ErrUsedEvidence) {
		t.Errorf("evicted, by the document that was used: %v; want ErrUsedEvidence", err)
	}
	// The same document under another signature, which anybody's message could be
	// taken for.
	attributes := attributesOf(t, used.Document, attributeOf(t, asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}, now))
	if _, err := enroll(AWSDocument{used.Document, attributes, r.sign(t, attributes)}); !errors.Is(err, ErrUsedEvidence) {
		t.Errorf("evicted, by the same document signed anew: %v; want ErrUsedEvidence", err)
	}
	again, err := enroll(started(bootTime.Add(2 * time.Minute)))
	if err != nil || again.Handle != first.Handle {
		t.Errorf("evicted, and started again: %v, %v", again, err)
	}
	kvs, _, _, err := st.List(t.Context(), TokenPrefix+usedKind+"/", "", 10, 0)
	if err != nil || len(kvs) != 2 {
		t.Fatalf("%d records of used documents, %v; want 2", len(kvs), err)
	}
	for _, kv := range kvs { // as long as the document can be shown
		if SingleUse(kv.Key) || TokenExpired(kv, bootTime.Add(time.Hour)) || !TokenExpired(kv, bootTime.Add(2*time.Hour)) {
			t.Errorf("the record %s does not last as long as its document can be shown", kv.Key)
		}
	}
}

func TestCertificatesThatVerifyNoDocument(t *testing.T) {
	_, r := ec2(t)
	if err := CheckAWSCertificate(r.cert); err != nil {
		t.Errorf("RSA of 2048 bits: %v", err)
	}
	if err := CheckAWSCertificate(newSite(t).cert); err == nil {
		t.Error("an ECDSA certificate is taken")
	}
	if err := CheckAWSCertificate(&x509.Certificate{PublicKey: &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}}); err == nil {
		t.Error("RSA of 1024 bits is taken")
	}
}

// FuzzAWSDocument takes every signature for good, so that all of it is parsed.
func FuzzAWSDocument(f *testing.F) {
	a, r := ec2(f)
	good := r.document(f, ec2Fields())
	f.Add(good.Document, good.SignedAttributes)
	f.Add([]byte("{}"), attributesOf(f, []byte("{}")))
	f.Add([]byte("{}"), []byte{0x31, 0x80, 0, 0})
	f.Fuzz(func(t *testing.T, document, attributes []byte) {
		sum := sha256.Sum256(document)
		if err := checkSignedAttributes(attributes, document); err == nil && !bytes.Contains(attributes, sum[:]) {
			t.Fatalf("%x are taken for the attributes of %q", attributes, document)
		}
		n, err := a.node(document, []string{"eu-central-1"}, bootTime)
		if refusal, ok := errors.AsType[*RefusedError](err); (n == nil) == (err == nil) || err != nil && (!ok || refusal.Kind != AWSKind) {
			t.Fatalf("proved %v, error %v", n, err)
		}
		if err == nil && !strings.HasPrefix(n.ID.Path(), "/agent/aws/123456789012/eu-central-1/i-") && !strings.HasPrefix(n.ID.Path(), "/agent/aws/210987654321/eu-central-1/i-") {
			t.Fatalf("%q proved %s", document, n.ID)
		}
	})
}

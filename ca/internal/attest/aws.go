// Amazon EC2: the identity document of an instance, under the signature that its
// metadata service makes with the RSA 2048 key of a region. The agent has taken
// the PKCS #7 message apart (agent/internal/attest/pkcs7.go), so that nothing is
// parsed here before its signature holds. A document is for nobody in particular,
// and has no end of its own: what it is good for is its age.

package attest

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/sdk/possession"
)

// AWSKind is the kind of evidence in an agent's record.
const AWSKind = "aws"

const (
	maxAWSDocument   = 16 << 10
	maxAWSAttributes = 4 << 10
	maxAWSSignature  = 1 << 10 // RSA of 8192 bits
	// maxAWSAhead is how far the CA's clock may be behind Amazon's.
	maxAWSAhead = 5 * time.Minute
)

// AWS proves instances of EC2. It is safe for concurrent use.
type AWS struct {
	TrustDomain spiffeid.TrustDomain
	// Accounts are whose instances are nodes.
	Accounts []string
	// Certificates are those of Amazon's, by the region whose documents they sign.
	Certificates map[string][]*x509.Certificate
	// MaxAge is how long after an instance was started its document is good.
	MaxAge time.Duration
}

// AWSDocument is what an agent shows of its instance.
type AWSDocument struct {
	// Document is JSON, and what the signature means.
	Document []byte
	// SignedAttributes have the document's digest in them, and are what is signed:
	// a SET OF attributes in DER (RFC 5652 §5.4).
	SignedAttributes []byte
	Signature        []byte
}

// awsInstance is what counts of a document.
type awsInstance struct {
	AccountID        string    `json:"accountId"`
	Region           string    `json:"region"`
	InstanceID       string    `json:"instanceId"`
	PendingTime      time.Time `json:"pendingTime"`
	AvailabilityZone string    `json:"availabilityZone"`
	ImageID          string    `json:"imageId"`
	InstanceType     string    `json:"instanceType"`
}

var (
	awsAccount    = regexp.MustCompile(`^[0-9]{12}$`)
	awsRegion     = regexp.MustCompile(`^[a-z]{2,8}(-[a-z0-9]+){2,4}$`)
	awsInstanceID = regexp.MustCompile(`^i-[0-9a-f]{8,32}$`)
)

// CheckAWSAccount and CheckAWSRegion judge what an operator wrote.
func CheckAWSAccount(id string) error {
	if !awsAccount.MatchString(id) {
		return errors.New("an account has 12 digits")
	}
	return nil
}

// CheckAWSRegion says why name is no region.
func CheckAWSRegion(name string) error {
	if !awsRegion.MatchString(name) {
		return errors.New("a region is such as eu-central-1")
	}
	return nil
}

// CheckAWSCertificate says why no document is verified by c: the keys of the two
// older signatures of Amazon's are RSA of 1024 bits, and DSA.
func CheckAWSCertificate(c *x509.Certificate) error {
	if _, ok := c.PublicKey.(*rsa.PublicKey); !ok {
		return errors.New("its key is not RSA: take the region's certificate for the RSA-2048 signature")
	}
	return possession.CheckKey(c.PublicKey)
}

// Prove says which instance's the document is.
func (a *AWS) Prove(d AWSDocument, now time.Time) (*Node, error) {
	regions, err := a.verify(d, now)
	if err != nil {
		return nil, err
	}
	return a.node(d.Document, regions, now)
}

// node reads a document that is verified by certificates of regions.
func (a *AWS) node(document []byte, regions []string, now time.Time) (*Node, error) {
	var i awsInstance
	if err := json.Unmarshal(document, &i); err != nil {
		return nil, refused(AWSKind, Malformed, "the document is not JSON as Amazon writes it")
	}
	if err := a.admit(i, regions, now); err != nil {
		return nil, err
	}
	id, err := entry.AttestedID(a.TrustDomain, AWSKind, i.AccountID, i.Region, i.InstanceID)
	if err != nil {
		return nil, refused(AWSKind, NotAllowed, "the instance cannot be a node's name: %v", err)
	}
	f := facts{kind: AWSKind}
	f.add("account", i.AccountID)
	f.add("region", i.Region)
	f.add("zone", i.AvailabilityZone)
	f.add("instance-id", i.InstanceID)
	f.add("instance-type", i.InstanceType)
	f.add("image-id", i.ImageID)
	return (&Node{ID: id, Kind: AWSKind, Selectors: f.list}).once(document, i.PendingTime.Add(a.MaxAge)), nil
}

// verify returns the regions whose certificates signed d. Only then is any of it
// parsed: the attributes, which hold the digest of the document.
func (a *AWS) verify(d AWSDocument, now time.Time) (regions []string, err error) {
	for _, part := range []struct {
		what string
		data []byte
		most int
	}{
		{"document", d.Document, maxAWSDocument},
		{"list of signed attributes", d.SignedAttributes, maxAWSAttributes},
		{"signature", d.Signature, maxAWSSignature},
	} {
		if len(part.data) == 0 || len(part.data) > part.most {
			return nil, refused(AWSKind, Malformed, "the %s has %d bytes; want 1 to %d", part.what, len(part.data), part.most)
		}
	}
	signed, ended := sha256.Sum256(d.SignedAttributes), false
	for region, certs := range a.Certificates {
		for _, c := range certs {
			key, ok := c.PublicKey.(*rsa.PublicKey)
			if !ok || rsa.VerifyPKCS1v15(key, crypto.SHA256, signed[:], d.Signature) != nil {
				continue
			}
			if now.Before(c.NotBefore) || now.After(c.NotAfter) {
				ended = true
				continue
			}
			regions = append(regions, region)
		}
	}
	switch {
	case len(regions) > 0:
	case ended:
		return nil, refused(AWSKind, Untrusted, "the certificate that signed the document has ended: put Amazon's present one for the region into node_attestors.aws.certificates")
	default:
		return nil, refused(AWSKind, Untrusted, "no certificate in node_attestors.aws.certificates signed the document: name the one of the instance's region for the RSA-2048 signature")
	}
	if err := checkSignedAttributes(d.SignedAttributes, d.Document); err != nil {
		return nil, refused(AWSKind, NotProved, "the signature is not over this document: %v", err)
	}
	return regions, nil
}

// admit says why a verified instance is no node.
func (a *AWS) admit(i awsInstance, regions []string, now time.Time) error {
	if !awsAccount.MatchString(i.AccountID) || !awsRegion.MatchString(i.Region) || !awsInstanceID.MatchString(i.InstanceID) || i.PendingTime.IsZero() {
		return refused(AWSKind, NotProved, "the document lacks accountId, region, instanceId or pendingTime as Amazon writes them")
	}
	if !slices.Contains(regions, i.Region) {
		return refused(AWSKind, Untrusted, "the document is of region %s, and not signed by a certificate of that region", i.Region)
	}
	if !slices.Contains(a.Accounts, i.AccountID) {
		return refused(AWSKind, NotAllowed, "account %s is not among node_attestors.aws.accounts", i.AccountID)
	}
	switch age := now.Sub(i.PendingTime); {
	case age > a.MaxAge:
		return refused(AWSKind, NotAllowed, "the instance was started %v ago, and its document is good for %v (node_attestors.aws.max_age): stop and start it, or use a join token", age.Round(time.Second), a.MaxAge)
	case age < -maxAWSAhead:
		return refused(AWSKind, NotAllowed, "the instance was started %v from now, by the CA's clock: set that right", -age.Round(time.Second))
	}
	return nil
}

// What RFC 5652 §11 says of signed attributes.
var (
	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
)

type signedAttribute struct {
	Type   asn1.ObjectIdentifier
	Values []asn1.RawValue `asn1:"set"`
}

// checkSignedAttributes wants the attributes, whose signature holds, to be those
// of content. Each that counts is there once, with one value.
func checkSignedAttributes(der, content []byte) error {
	var attributes []signedAttribute
	if rest, err := asn1.UnmarshalWithParams(der, &attributes, "set"); err != nil || len(rest) > 0 {
		return errors.New("it has no signed attributes")
	}
	var contentType asn1.ObjectIdentifier
	var digest []byte
	for oid, into := range map[*asn1.ObjectIdentifier]any{&oidContentType: &contentType, &oidMessageDigest: &digest} {
		var found []asn1.RawValue
		for _, a := range attributes {
			if a.Type.Equal(*oid) {
				found = append(found, a.Values...)
			}
		}
		if len(found) != 1 {
			return errors.New("its signed attributes do not name one content type and one digest")
		}
		if rest, err := asn1.Unmarshal(found[0].FullBytes, into); err != nil || len(rest) > 0 {
			return errors.New("its signed attributes do not parse")
		}
	}
	if sum := sha256.Sum256(content); !contentType.Equal(oidData) || !bytes.Equal(digest, sum[:]) {
		return errors.New("its digest in the signed attributes is another")
	}
	return nil
}

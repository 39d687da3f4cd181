// Package forge is for tests and for spiffe-conform: it holds the keys of a trust
// domain and mints any document with them, above all malformed ones. Every
// enforcement point has to refuse these although their signatures are good.
//
// [New] makes a trust domain; [Authority.Leaf] mints a sound X509-SVID unless told
// otherwise; [Authority.JWT] signs any header and claims.
package forge

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/sdk/svid"
)

// TB is what forge needs of a test. Fatal must not return.
type TB interface {
	Helper()
	Fatal(args ...any)
}

// The extensions that tests forge, for Extension.
var (
	KeyUsage         = asn1.ObjectIdentifier{2, 5, 29, 15}
	SubjectAltName   = asn1.ObjectIdentifier{2, 5, 29, 17}
	BasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
)

// Change alters a certificate template before it is signed.
type Change func(*x509.Certificate)

// Authority is a certificate with its key; it signs whatever it is asked to. Made
// by New it is the root of a trust domain and also has a JWT key.
type Authority struct {
	TrustDomain spiffeid.TrustDomain
	Cert        *x509.Certificate
	Key         crypto.Signer
	Parent      *Authority // nil for a root

	JWTKey crypto.Signer // ECDSA P-256
	KeyID  string

	tb TB
}

// New makes a trust domain with a root that obeys every rule, but for changes.
func New(tb TB, trustDomain string, changes ...Change) *Authority {
	tb.Helper()
	a := &Authority{TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), tb: tb, JWTKey: newKey(tb)}
	template := a.authorityTemplate("root")
	a.Key = a.changed(template, changes)
	a.Cert = a.sign(template, nil, a.Key.Public())
	der, err := x509.MarshalPKIXPublicKey(a.JWTKey.Public())
	if err != nil {
		tb.Fatal(err)
	}
	sum := sha256.Sum256(der)
	a.KeyID = hex.EncodeToString(sum[:8])
	return a
}

// Intermediate makes an authority below this one that obeys every rule, but for
// changes.
func (a *Authority) Intermediate(changes ...Change) *Authority {
	a.tb.Helper()
	sub := &Authority{TrustDomain: a.TrustDomain, Parent: a, JWTKey: a.JWTKey, KeyID: a.KeyID, tb: a.tb}
	template := a.authorityTemplate("intermediate")
	sub.Key = a.changed(template, changes)
	sub.Cert = a.sign(template, a.Cert, sub.Key.Public())
	return sub
}

// Again is another certificate of this authority: its key, name and issuer, with
// changes.
func (a *Authority) Again(changes ...Change) *x509.Certificate {
	a.tb.Helper()
	if a.Parent != nil {
		return a.CrossSigned(a.Parent, changes...)
	}
	return a.CrossSigned(a, changes...)
}

// CrossSigned is a certificate of this authority, its key and its name, that by
// signs, with changes.
func (a *Authority) CrossSigned(by *Authority, changes ...Change) *x509.Certificate {
	a.tb.Helper()
	template := a.authorityTemplate("")
	template.Subject, template.SubjectKeyId = a.Cert.Subject, a.Cert.SubjectKeyId
	a.changed(template, changes)
	if by == a {
		return a.sign(template, nil, a.Key.Public())
	}
	return by.sign(template, by.Cert, a.Key.Public())
}

func (a *Authority) authorityTemplate(role string) *x509.Certificate {
	serial := newSerial(a.tb)
	now := time.Now()
	return &x509.Certificate{
		SerialNumber:          serial.Big(),
		Subject:               pkix.Name{CommonName: "forge " + role, SerialNumber: serial.String()},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            -1,
		URIs:                  []*url.URL{a.TrustDomain.ID().URL()},
	}
}

// SVID is a minted X509-SVID with its key.
type SVID struct {
	Chain []*x509.Certificate // leaf first, without the root
	Key   crypto.Signer
}

// Leaf mints an X509-SVID for trust domain + path that obeys every rule, but for
// changes.
func (a *Authority) Leaf(path string, changes ...Change) *SVID {
	a.tb.Helper()
	now := time.Now()
	id := &url.URL{Scheme: "spiffe", Host: a.TrustDomain.Name(), Path: path}
	sum := sha256.Sum256([]byte(path))
	template := &x509.Certificate{
		SerialNumber:          newSerial(a.tb).Big(),
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		SubjectKeyId:          sum[:20],
		URIs:                  []*url.URL{id},
	}
	key := a.changed(template, changes)
	leaf := a.sign(template, a.Cert, key.Public())
	return &SVID{Chain: append([]*x509.Certificate{leaf}, a.chain()...), Key: key}
}

// SelfAsSVID presents the authority's own certificate and key.
func (a *Authority) SelfAsSVID() *SVID {
	if a.Parent == nil {
		return &SVID{Chain: []*x509.Certificate{a.Cert}, Key: a.Key}
	}
	return &SVID{Chain: a.chain(), Key: a.Key}
}

func (a *Authority) chain() (chain []*x509.Certificate) {
	for ; a.Parent != nil; a = a.Parent {
		chain = append(chain, a.Cert)
	}
	return chain
}

// Root is the top authority.
func (a *Authority) Root() *Authority {
	for a.Parent != nil {
		a = a.Parent
	}
	return a
}

// Bundle is the trust bundle: root and JWT key.
func (a *Authority) Bundle() *spiffebundle.Bundle {
	a.tb.Helper()
	bundle := spiffebundle.New(a.TrustDomain)
	bundle.AddX509Authority(a.Root().Cert)
	if err := bundle.AddJWTAuthority(a.KeyID, a.JWTKey.Public()); err != nil {
		a.tb.Fatal(err)
	}
	return bundle
}

// changed alters template, and gives the key that it is for: a new one of P-256
// unless OfKey says otherwise.
func (a *Authority) changed(template *x509.Certificate, changes []Change) crypto.Signer {
	a.tb.Helper()
	for _, change := range changes {
		change(template)
	}
	if key, ok := template.PublicKey.(crypto.Signer); ok {
		template.PublicKey = nil
		return key
	}
	return newKey(a.tb)
}

// OfKey makes the certificate one of key, in the place of a new one of P-256.
func OfKey(key crypto.Signer) Change {
	return func(c *x509.Certificate) { c.PublicKey = key } // where changed finds it
}

func (a *Authority) sign(template, parent *x509.Certificate, pub crypto.PublicKey) *x509.Certificate {
	a.tb.Helper()
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, a.Key)
	if err != nil {
		a.tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.tb.Fatal(err)
	}
	return cert
}

// ID is the SPIFFE ID of the leaf, which has to be a sound one.
func (s *SVID) ID() spiffeid.ID { return spiffeid.RequireFromURI(s.Chain[0].URIs[0]) }

// Raw is the chain in DER.
func (s *SVID) Raw() (raw [][]byte) {
	for _, cert := range s.Chain {
		raw = append(raw, cert.Raw)
	}
	return raw
}

// X509SVID is the SVID for go-spiffe, which is not asked whether it is sound.
func (s *SVID) X509SVID() *x509svid.SVID {
	id, _ := x509svid.IDFromCert(s.Chain[0])
	return &x509svid.SVID{ID: id, Certificates: s.Chain, PrivateKey: s.Key}
}

// Certificate is the SVID for crypto/tls.
func (s *SVID) Certificate() tls.Certificate {
	return tls.Certificate{Certificate: s.Raw(), PrivateKey: s.Key}
}

// URIs replaces the URI SANs; what url.Parse does not take, RawURIs does.
func URIs(uris ...string) Change {
	return func(c *x509.Certificate) {
		c.URIs = nil
		for _, text := range uris {
			uri, err := url.Parse(text)
			if err != nil {
				panic("forge: " + err.Error())
			}
			c.URIs = append(c.URIs, uri)
		}
	}
}

// RawURIs replaces the whole SAN extension by URI names of exactly these bytes.
func RawURIs(critical bool, uris ...string) Change {
	var names []asn1.RawValue
	for _, text := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(text)})
	}
	der, err := asn1.Marshal(names)
	if err != nil {
		panic("forge: " + err.Error())
	}
	return Extension(SubjectAltName, critical, der)
}

// Extension sets an extension to these bytes, in the place of what the template
// would have made.
func Extension(oid asn1.ObjectIdentifier, critical bool, value []byte) Change {
	return func(c *x509.Certificate) {
		c.ExtraExtensions = slices.DeleteFunc(c.ExtraExtensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) })
		c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
	}
}

func newKey(tb TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func newSerial(tb TB) svid.Serial {
	tb.Helper()
	serial, err := svid.NewSerial(1, 100)
	if err != nil {
		tb.Fatal(err)
	}
	return serial
}

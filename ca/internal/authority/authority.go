// Package authority issues SVIDs: the certificate profile, the lint that every
// certificate passes before the key touches it, the leaf signer, the policy on
// CSRs and keys, and JWT-SVIDs. It knows signers and certificates, not where they
// come from (ca/internal/upstream) and not who may have an SVID (ca).
package authority

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid"
)

// Backdate is how long before its issuance an X509-SVID is valid, for clocks that
// are behind.
const Backdate = time.Minute

// X509Authority signs leaves. It is immutable from its first use on, and safe for
// concurrent use as far as Signer is.
type X509Authority struct {
	Chain  []*x509.Certificate // the issuer and what is above it, without the root
	Root   *x509.Certificate
	Signer crypto.Signer // key of Chain[0]

	once  sync.Once // makes what follows, at first use
	form  *leafForm
	key   *signing
	fault error
}

// LeafRequest asks for an X509-SVID.
type LeafRequest struct {
	SPIFFEID  spiffeid.ID
	PublicKey crypto.PublicKey
	Serial    svid.Serial
	// TTL is how long it lives from Now, cut at the end of the issuing chain.
	TTL time.Duration
	// DNSNames are DNS SANs; CommonName is the subject. Both are optional.
	DNSNames   []string
	CommonName string
	Now        time.Time
}

// Leaf is a signed X509-SVID.
type Leaf struct {
	DER                 []byte
	NotBefore, NotAfter time.Time
	Serial              svid.Serial
	Cut                 bool // the TTL was cut at the end of the issuing chain
}

// InvalidError reports a request that the authority refuses to sign.
type InvalidError struct {
	Field  string // of LeafRequest or JWTRequest in snake case, or "csr"
	Reason string
}

// Error implements error.
func (e *InvalidError) Error() string { return e.Field + ": " + e.Reason }

func invalid(field, format string, args ...any) error {
	return &InvalidError{Field: field, Reason: fmt.Sprintf(format, args...)}
}

// TrustDomain is the one that is signed for, by the SPIFFE ID of the issuing
// certificate: the root may be that of a larger PKI.
func (a *X509Authority) TrustDomain() (spiffeid.TrustDomain, error) {
	if a == nil || a.Root == nil || len(a.Chain) == 0 || a.Signer == nil {
		return spiffeid.TrustDomain{}, errors.New("authority is incomplete")
	}
	if len(a.Chain[0].URIs) != 1 {
		return spiffeid.TrustDomain{}, errors.New("the issuing certificate does not carry the SPIFFE ID of a trust domain")
	}
	id, err := spiffeid.FromURI(a.Chain[0].URIs[0])
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("read the SPIFFE ID of the issuing certificate: %w", err)
	}
	if id.Path() != "" { // X6
		return spiffeid.TrustDomain{}, fmt.Errorf("the SPIFFE ID of the issuing certificate, %q, is a workload's", id)
	}
	return id.TrustDomain(), nil
}

// ID names the authority in revocation records and logs: the hex subject key ID
// of the issuing certificate.
func (a *X509Authority) ID() string { return fmt.Sprintf("%x", a.Chain[0].SubjectKeyId) }

// NotAfter is when the issuing chain ends.
func (a *X509Authority) NotAfter() time.Time {
	end := a.Root.NotAfter
	for _, cert := range a.Chain {
		if cert.NotAfter.Before(end) {
			end = cert.NotAfter
		}
	}
	return end
}

// ready is what issuing needs besides the request; it is made once.
func (a *X509Authority) ready() error {
	if a == nil {
		return errors.New("issue an X509-SVID: authority is incomplete")
	}
	a.once.Do(func() {
		if a.form, a.key, a.fault = a.prepare(); a.fault != nil {
			a.fault = fmt.Errorf("issue an X509-SVID: %w", a.fault)
		}
	})
	return a.fault
}

// Fault says why the authority signs nothing: it is incomplete, or ErrFaultyKey.
func (a *X509Authority) Fault() error {
	if err := a.ready(); err != nil {
		return err
	}
	return a.key.fault()
}

func (a *X509Authority) prepare() (*leafForm, *signing, error) {
	td, err := a.TrustDomain()
	if err != nil {
		return nil, nil, err
	}
	key, err := newSigning(a.Signer)
	if err != nil {
		return nil, nil, err
	}
	issuer := a.Chain[0]
	if public, ok := issuer.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(a.Signer.Public()) {
		return nil, nil, errors.New("the signer's key is not that of the issuing certificate")
	}
	form, err := newLeafForm(td, issuer, key.algorithm, a.NotAfter())
	return form, key, err
}

// Issue signs a leaf. A request that breaks the profile is an *InvalidError; that
// a signed certificate would break it is a *LintError, and nothing was signed.
func (a *X509Authority) Issue(req LeafRequest) (*Leaf, error) {
	if err := a.ready(); err != nil {
		return nil, err
	}
	if err := checkLeafRequest(req, a.form.trustDomain); err != nil {
		return nil, err
	}
	values, cut, err := a.values(req)
	if err != nil {
		return nil, err
	}
	tbs, err := a.form.encode(values)
	if err != nil {
		return nil, fmt.Errorf("encode the X509-SVID of %s: %w", req.SPIFFEID, err)
	}
	if err := lintLeaf(tbs, req, values, a.Chain[0]); err != nil {
		return nil, err
	}
	signature, err := a.key.sign(tbs)
	if err != nil {
		return nil, fmt.Errorf("sign the X509-SVID of %s: %w", req.SPIFFEID, err)
	}
	der, err := wrap(tbs, a.key.algorithm, signature)
	if err != nil {
		return nil, fmt.Errorf("encode the X509-SVID of %s: %w", req.SPIFFEID, err)
	}
	return &Leaf{DER: der, NotBefore: values.notBefore, NotAfter: values.notAfter, Serial: req.Serial, Cut: cut}, nil
}

// values is what a leaf for req says.
func (a *X509Authority) values(req LeafRequest) (v leafValues, cut bool, err error) {
	key, err := encodeKey(req.PublicKey)
	if err != nil {
		return leafValues{}, false, err
	}
	notBefore := req.Now.Add(-Backdate).UTC().Truncate(time.Second)
	if issuer := a.Chain[0]; notBefore.Before(issuer.NotBefore) {
		notBefore = issuer.NotBefore
	}
	notAfter := req.Now.Add(req.TTL).UTC().Truncate(time.Second)
	if a.form.end.Before(notAfter) {
		notAfter, cut = a.form.end, true
	}
	if !notAfter.After(req.Now) {
		return leafValues{}, false, fmt.Errorf("issue an X509-SVID: the issuing chain ended at %s", a.form.end.Format(time.RFC3339))
	}
	return leafValues{
		serial: req.Serial, notBefore: notBefore, notAfter: notAfter, key: key,
		id: req.SPIFFEID.String(), commonName: req.CommonName, dnsNames: req.DNSNames,
	}, cut, nil
}

// Which secret a name stands for, and when a name stands for nothing.

package sds

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/anypb"

	"merlon.dev/agent/internal/cache"
)

// The names beside SPIFFE IDs. Those that Envoys are configured with for other
// SPIFFE implementations mean the same here.
const (
	nameDefault = "default" // the caller's default X509-SVID
	nameRootCA  = "ROOTCA"  // the trust bundle of the own trust domain
	nameAll     = "ALL"     // those of all trust domains, each for its own SPIFFE IDs
	nameEvery   = "*"       // every SPIFFE ID that stands for something
)

// spiffeValidator is Envoy's extension that judges a chain by the trust bundle
// of the trust domain that the SVID names, and by no other.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// resource is what a name stands for: an X509-SVID or a trust bundle.
type resource struct {
	name  string
	svid  *cache.SVID  // or
	trust *cache.Trust // exactly one of them
}

// version differs for each X509-SVID and each trust bundle, and says which it
// is; it is never empty.
func (r resource) version() string {
	if r.svid != nil {
		return r.svid.Peer.SerialHex
	}
	return strconv.FormatUint(r.trust.Sequence, 10)
}

// standing is what the agent knows of a name. The zero value says nothing.
type standing int

const (
	unsure  standing = iota // the CA is away, or has not signed yet
	absent                  // the name stands for nothing that the caller may have
	present                 // here it is
)

// holdings is what one caller may have at one moment.
type holdings struct {
	view cache.View
	td   spiffeid.TrustDomain
	// plain: the caller's Envoy is not to use the SPIFFE validator.
	plain bool
}

// look finds what name stands for. Like the Workload API it knows nothing for
// who has no entry, the trust bundle included. SPIFFE IDs are compared as they
// are written: another spelling is another name.
func (h holdings) look(name string) (resource, standing) {
	switch {
	case len(h.view.Entries) == 0:
		return resource{}, h.missing()
	case name == nameDefault:
		return h.certificate(name, h.view.Entries[0].SPIFFEID.String())
	// Without the SPIFFE validator the roots of all trust domains would vouch
	// for each other's SPIFFE IDs, so there is no ALL.
	case name == nameRootCA, name == h.td.IDString(), name == nameAll && !h.plain:
		if h.view.Trust == nil {
			return resource{}, unsure
		}
		return resource{name: name, trust: h.view.Trust}, present
	default:
		return h.certificate(name, name)
	}
}

// certificate finds the X509-SVID of id. That the CA has not signed one yet, or
// is away, does not take the name away.
func (h holdings) certificate(name, id string) (resource, standing) {
	for _, held := range h.view.SVIDs {
		if held.Peer.ID.String() == id {
			return resource{name: name, svid: held}, present
		}
	}
	if slices.ContainsFunc(h.view.Entries, func(e *cache.Entry) bool { return e.SPIFFEID.String() == id }) {
		return resource{}, unsure
	}
	return resource{}, h.missing()
}

// missing is what it means that no entry speaks of a name.
func (h holdings) missing() standing {
	if h.view.Current {
		return absent
	}
	return unsure
}

// every lists the SPIFFE IDs that stand for something.
func (h holdings) every() (names []string) {
	if len(h.view.Entries) == 0 {
		return nil
	}
	names = append(names, h.td.IDString())
	for _, e := range h.view.Entries {
		names = append(names, e.SPIFFEID.String())
	}
	return names
}

// pack makes r what goes over the wire.
func (h holdings) pack(r resource) (*anypb.Any, error) {
	secret := &tlsv3.Secret{Name: r.name}
	if r.svid != nil {
		chain, err := pemOf(r.svid.Chain)
		if err != nil {
			return nil, fmt.Errorf("encode the X509-SVID of %s: %w", r.svid.Peer.ID, err)
		}
		secret.Type = &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(chain),
			PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: r.svid.Key})),
		}}
		return anypb.New(secret)
	}
	roots, err := pemOf(r.trust.X509)
	if err != nil {
		return nil, fmt.Errorf("encode the trust bundle of %s: %w", h.td.Name(), err)
	}
	context, err := h.validation(roots)
	if err != nil {
		return nil, err
	}
	secret.Type = &tlsv3.Secret_ValidationContext{ValidationContext: context}
	return anypb.New(secret)
}

// validation tells Envoy to accept what roots vouch for.
func (h holdings) validation(roots []byte) (*tlsv3.CertificateValidationContext, error) {
	if h.plain {
		return &tlsv3.CertificateValidationContext{TrustedCa: inline(roots)}, nil
	}
	config, err := anypb.New(&tlsv3.SPIFFECertValidatorConfig{
		TrustDomains: []*tlsv3.SPIFFECertValidatorConfig_TrustDomain{{Name: h.td.Name(), TrustBundle: inline(roots)}},
	})
	if err != nil {
		return nil, err
	}
	return &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: config},
	}, nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// pemOf encodes certificates that lie one after the other in DER.
func pemOf(der []byte) (text []byte, err error) {
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, err
	}
	for _, cert := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return text, nil
}

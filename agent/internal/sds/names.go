// Which secret a name stands for, and when a name stands for nothing.

package sds

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"strconv"
	"strings"

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
	nameEvery   = "*"       // every SPIFFE ID that stands for something, those of trust domains too
)

// spiffeValidator is Envoy's extension that judges a chain by the trust bundle
// of the trust domain that the SVID names, and by no other.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// resource is what a name stands for: an X509-SVID, or the trust bundles of trust
// domains, each for its own SPIFFE IDs.
type resource struct {
	name  string
	svid  *cache.SVID // or
	roots []roots
	// own is the sequence number of the own trust bundle, where that is among them.
	own uint64
}

// roots are the X.509 authorities of one trust domain.
type roots struct {
	td      string
	der     []byte
	version string
}

// version differs for each X509-SVID and each trust bundle, and says which it
// is; it is never empty.
func (r resource) version() string {
	switch {
	case r.svid != nil:
		return r.svid.Peer.SerialHex
	case len(r.roots) == 1:
		return r.roots[0].version
	}
	sum := sha256.New()
	for _, of := range r.roots {
		fmt.Fprintf(sum, "%q %s\n", of.td, of.version)
	}
	return hex.EncodeToString(sum.Sum(nil)[:8])
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
	case isTrustDomain(name) && name != h.td.IDString():
		return h.foreign(name)
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
		own := h.view.Trust
		r := resource{name: name, roots: []roots{{h.td.Name(), own.X509, strconv.FormatUint(own.Sequence, 10)}}, own: own.Sequence}
		if name == nameAll {
			r.roots = append(r.roots, h.federated()...)
		}
		return r, present
	default:
		return h.certificate(name, name)
	}
}

// federated are the roots of the other trust domains that the caller federates
// with.
func (h holdings) federated() (found []roots) {
	for _, f := range h.view.Federated {
		if len(f.X509) > 0 {
			found = append(found, roots{f.TrustDomain.Name(), f.X509, f.Version})
		}
	}
	return found
}

// foreign finds what the name of another trust domain stands for. Where the caller
// does not federate with it, or its trust bundle is not there, those are roots that
// vouch for nobody: see nobody.
func (h holdings) foreign(name string) (resource, standing) {
	for _, of := range h.federated() {
		if "spiffe://"+of.td == name {
			return resource{name: name, roots: []roots{of}}, present
		}
	}
	if h.missing() == unsure {
		return resource{}, unsure
	}
	return resource{name: name, roots: []roots{{strings.TrimPrefix(name, "spiffe://"), nobody(), "nobody"}}}, present
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
	for _, of := range h.federated() {
		names = append(names, "spiffe://"+of.td)
	}
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
	context, err := h.validation(r.roots)
	if err != nil {
		return nil, err
	}
	secret.Type = &tlsv3.Secret_ValidationContext{ValidationContext: context}
	return anypb.New(secret)
}

// validation tells Envoy to accept what the roots of each trust domain vouch for.
func (h holdings) validation(all []roots) (*tlsv3.CertificateValidationContext, error) {
	var domains tlsv3.SPIFFECertValidatorConfig
	for _, of := range all {
		text, err := pemOf(of.der)
		if err != nil {
			return nil, fmt.Errorf("encode the trust bundle of %s: %w", of.td, err)
		}
		if h.plain { // there is no name for more than one
			return &tlsv3.CertificateValidationContext{TrustedCa: inline(text)}, nil
		}
		domains.TrustDomains = append(domains.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{Name: of.td, TrustBundle: inline(text)})
	}
	config, err := anypb.New(&domains)
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

// TLS configurations in which the strict verifier decides. go-spiffe's stock
// configuration authorizes in VerifyPeerCertificate, which Go does not call on a
// resumed session: a peer that was once let in comes back after a deny, or after
// its root was removed. Here tickets are off, and the check sits in
// VerifyConnection, which runs on every connection.

package svid

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// HandshakeTimeout is how long a TLS handshake may take. Callers that handshake
// themselves set it as a deadline; a tls.Config cannot.
const HandshakeTimeout = 5 * time.Second

// TLS builds mutual-TLS configurations: version 1.3 only, hybrid post-quantum key
// exchange preferred, no session tickets, every connection verified. The zero
// value lets nobody in. Configurations read SVIDs and Bundles anew for every
// handshake, and are safe for concurrent use if these and Admit are.
type TLS struct {
	SVIDs   x509svid.Source   // what this side presents
	Bundles x509bundle.Source // what the other side is checked against

	// Verifier, when set, checks it in the place of VerifyChain, such as a *Trust that
	// remembers what it has seen. Bundles has to be the same trust, for IncludeRoot.
	Verifier Verifier

	// Admit decides about a verified peer; an error ends the handshake. nil refuses
	// everyone. It runs inside the handshake, before the peer's proof that it holds
	// the private key: decide only, and count or record nothing in its name.
	Admit func(*Peer) error

	// OnPeer, when set, is told whom Admit let in, likewise before the handshake
	// is complete. conn is the connection below TLS on a server, and nil on a
	// client, which makes a configuration per connection if it has to know.
	OnPeer func(conn net.Conn, p *Peer)

	// AnonymousPeers makes a server let in a client that shows no certificate, past
	// Admit. One that shows a certificate is verified as ever.
	AnonymousPeers bool

	// NextProtos are the ALPN protocols; none means h2.
	NextProtos []string

	// OptionalALPN lets in a peer with which no protocol was agreed, as most
	// databases need; it is implied where NextProtos has http/1.1, whose clients
	// often name none. All others name one, so that bytes for one protocol are never
	// read as another.
	OptionalALPN bool

	// IncludeRoot makes a server present its root after the chain, for peers that
	// do not have the trust bundle yet and know the hash of the root's key.
	IncludeRoot bool

	// Now is the clock; nil is time.Now.
	Now func() time.Time
}

// Verifier gives VerifyChain's answers about trust of its own.
type Verifier interface {
	VerifyChain(presented []*x509.Certificate, now time.Time) (*Peer, error)
}

// Server gives the configuration for the accepting side.
func (t TLS) Server() *tls.Config {
	cfg := t.base()
	cfg.ClientAuth = tls.RequireAnyClientCert // VerifyConnection does the rest
	if t.AnonymousPeers {
		cfg.ClientAuth = tls.RequestClientCert
	}
	cfg.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		return t.certificate(t.IncludeRoot)
	}
	cfg.VerifyConnection = t.verifyClient(nil)
	if t.OnPeer == nil {
		return cfg
	}
	// Only the hello knows the connection, so each gets its own configuration.
	outer := cfg.Clone()
	outer.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		inner := cfg.Clone()
		inner.VerifyConnection = t.verifyClient(hello.Conn)
		return inner, nil
	}
	return outer
}

// Client gives the configuration for the dialing side. Server names play no
// part: Admit says which SPIFFE ID is expected.
func (t TLS) Client() *tls.Config {
	cfg := t.base()
	// Go's own verification compares host names, which SPIFFE does not use, so it
	// is switched off and VerifyConnection takes its whole place. Unlike
	// VerifyPeerCertificate, that is also called when a session is resumed.
	cfg.InsecureSkipVerify = true
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		return t.certificate(false)
	}
	cfg.VerifyConnection = func(cs tls.ConnectionState) error { return t.verifyPeer(nil, cs) }
	return cfg
}

func (t TLS) base() *tls.Config {
	cfg := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: t.NextProtos,
		// Go orders them by its own preference: hybrids first.
		CurvePreferences: []tls.CurveID{
			tls.X25519MLKEM768, tls.SecP256r1MLKEM768, tls.SecP384r1MLKEM1024,
			tls.X25519, tls.CurveP256,
		},
		SessionTicketsDisabled: true, // and with them resumption and early data (T20)
		Time:                   t.Now,
	}
	if len(cfg.NextProtos) == 0 {
		cfg.NextProtos = []string{"h2"}
	}
	return cfg
}

func (t TLS) verifyClient(conn net.Conn) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if t.AnonymousPeers && len(cs.PeerCertificates) == 0 {
			if !t.protocolAgreed(cs) {
				return errors.New("refuse an anonymous peer: it names no application protocol (ALPN)")
			}
			return nil
		}
		return t.verifyPeer(conn, cs)
	}
}

func (t TLS) verifyPeer(conn net.Conn, cs tls.ConnectionState) error {
	now := time.Now
	if t.Now != nil {
		now = t.Now
	}
	var peer *Peer
	var err error
	if t.Verifier != nil {
		peer, err = t.Verifier.VerifyChain(cs.PeerCertificates, now())
	} else {
		peer, err = VerifyChain(cs.PeerCertificates, t.Bundles, now())
	}
	if err != nil {
		return err
	}
	if !t.protocolAgreed(cs) {
		return fmt.Errorf("refuse %s: it names no application protocol (ALPN)", peer.ID)
	}
	if t.Admit == nil {
		return fmt.Errorf("refuse %s: nothing says who may connect", peer.ID)
	}
	if err := t.Admit(peer); err != nil {
		return err
	}
	if t.OnPeer != nil {
		t.OnPeer(conn, peer)
	}
	return nil
}

func (t TLS) protocolAgreed(cs tls.ConnectionState) bool {
	return cs.NegotiatedProtocol != "" || t.OptionalALPN || slices.Contains(t.NextProtos, "http/1.1")
}

// certificate is what this side presents.
func (t TLS) certificate(withRoot bool) (*tls.Certificate, error) {
	if t.SVIDs == nil {
		return nil, errors.New("present an X509-SVID: there is no source of them")
	}
	svid, err := t.SVIDs.GetX509SVID()
	if err != nil {
		return nil, fmt.Errorf("present an X509-SVID: %w", err)
	}
	if svid == nil || len(svid.Certificates) == 0 || svid.PrivateKey == nil {
		return nil, errors.New("present an X509-SVID: the source has none")
	}
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	if withRoot {
		root, err := t.rootOf(svid)
		if err != nil {
			return nil, err
		}
		cert.Certificate = append(cert.Certificate, root.Raw)
	}
	return cert, nil
}

// rootOf finds the root above the last certificate of an SVID's chain. It comes
// from our own trust bundle, so matching names and key IDs is enough.
func (t TLS) rootOf(svid *x509svid.SVID) (*x509.Certificate, error) {
	if t.Bundles == nil {
		return nil, errors.New("present the root: there is no source of trust bundles")
	}
	bundle, err := t.Bundles.GetX509BundleForTrustDomain(svid.ID.TrustDomain())
	if err != nil {
		return nil, fmt.Errorf("present the root: %w", err)
	}
	top := svid.Certificates[len(svid.Certificates)-1]
	for _, root := range bundle.X509Authorities() {
		if bytes.Equal(root.RawSubject, top.RawIssuer) && bytes.Equal(root.SubjectKeyId, top.AuthorityKeyId) {
			return root, nil
		}
	}
	return nil, fmt.Errorf("present the root: none in the trust bundle of %s issued the chain", svid.ID.TrustDomain().IDString())
}

// PeerFromState tells who is at the other end of a connection that was made with
// a configuration of TLS and whose handshake is complete. It verifies nothing: it
// reads again what VerifyConnection has checked. NotAfter is the earliest of the
// presented certificates, so the root's end does not count; AuthorityIDs has the
// root's key ID last. False: the peer is anonymous.
func PeerFromState(cs tls.ConnectionState) (*Peer, bool) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return nil, false
	}
	leaf := cs.PeerCertificates[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, false
	}
	peer := peerOf(id, leaf)
	below := leaf
	for range cs.PeerCertificates {
		if len(below.AuthorityKeyId) == 0 || bytes.Equal(below.AuthorityKeyId, below.SubjectKeyId) {
			break
		}
		peer.AuthorityIDs = append(peer.AuthorityIDs, hex.EncodeToString(below.AuthorityKeyId))
		issuer := issuerOf(below, cs.PeerCertificates[1:])
		if issuer == nil {
			break
		}
		if issuer.NotAfter.Before(peer.NotAfter) {
			peer.NotAfter = issuer.NotAfter
		}
		below = issuer
	}
	return peer, true
}

func issuerOf(cert *x509.Certificate, among []*x509.Certificate) *x509.Certificate {
	for _, c := range among {
		if bytes.Equal(c.SubjectKeyId, cert.AuthorityKeyId) && bytes.Equal(c.RawSubject, cert.RawIssuer) {
			return c
		}
	}
	return nil
}

// AdmitID lets in exactly one SPIFFE ID.
func AdmitID(want spiffeid.ID) func(*Peer) error {
	return func(p *Peer) error {
		if want.IsZero() || p.ID != want {
			return fmt.Errorf("the peer is %s; %s is expected", p.ID, want)
		}
		return nil
	}
}

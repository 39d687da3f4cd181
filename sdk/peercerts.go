// The certificates of peers, of which a process keeps one copy each. crypto/tls does so
// for a client; a server of it parses and keeps those of each connection anew, which is
// more than all the rest of a connection at rest.

package sdk

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"runtime"
	"sync"
	"weak"
)

// peerCerts are the certificates in use, by the SHA-256 of their DER. The zero value is
// empty. It is safe for concurrent use, and keeps nothing alive.
type peerCerts struct {
	all sync.Map // [sha256.Size]byte → weak.Pointer[x509.Certificate]
}

// share puts, in the place of each certificate, the copy that is kept.
func (p *peerCerts) share(certs []*x509.Certificate) {
	for i, cert := range certs {
		certs[i] = p.one(cert)
	}
}

func (p *peerCerts) one(cert *x509.Certificate) *x509.Certificate {
	key, mine := sha256.Sum256(cert.Raw), weak.Make(cert)
	for {
		v, loaded := p.all.LoadOrStore(key, mine)
		if !loaded {
			break
		}
		if kept := v.(weak.Pointer[x509.Certificate]).Value(); kept != nil {
			if !bytes.Equal(kept.Raw, cert.Raw) {
				return cert // not in this life
			}
			return kept
		}
		if p.all.CompareAndSwap(key, v, mine) { // its cleanup has not run yet
			break
		}
	}
	runtime.AddCleanup(cert, func(key [sha256.Size]byte) { p.all.CompareAndDelete(key, mine) }, key)
	return cert
}

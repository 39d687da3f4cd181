// X.509 proof of possession: the node's certificate, and a signature that is
// good on this one connection.

package attest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/possession"
)

const (
	maxPOPChain = 5 // what the CA takes
	maxPEMBytes = 1 << 20
)

// X509POP shows a certificate that the node has from somebody else.
type X509POP struct {
	// CertFile is its chain in PEM, leaf first; KeyFile the leaf's key, which may be
	// in the same file.
	CertFile, KeyFile string
}

// Kind implements Attestor.
func (*X509POP) Kind() string { return "x509pop" }

// Evidence implements Attestor.
func (x *X509POP) Evidence(_ context.Context, conn tls.ConnectionState, req *capb.AttestRequest) error {
	chain, key, err := x.read()
	if err != nil {
		return err
	}
	statement, err := possession.Statement(conn, req.GetCsr())
	if err != nil {
		return err
	}
	signature, err := possession.Sign(key, statement)
	if err != nil {
		return err
	}
	req.Evidence = &capb.AttestRequest_X509Pop{X509Pop: &capb.X509Pop{Chain: chain, Signature: signature}}
	return nil
}

// read returns the chain without its root, which the CA has.
func (x *X509POP) read() (chain [][]byte, key crypto.Signer, err error) {
	certs, err := readFile("the node's certificate", x.CertFile, maxPEMBytes)
	if err != nil {
		return nil, nil, err
	}
	keys, err := readFile("the node's key", x.KeyFile, maxPEMBytes)
	if err != nil {
		return nil, nil, err
	}
	pair, err := tls.X509KeyPair(certs, onlyKeys(keys))
	if err != nil {
		return nil, nil, fmt.Errorf("read the node's certificate and key in %s and %s: %w", x.CertFile, x.KeyFile, err)
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("read the node's key in %s: it cannot sign", x.KeyFile)
	}
	for i, der := range pair.Certificate {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("read the node's certificate in %s: %w", x.CertFile, err)
		}
		if i > 0 && bytes.Equal(cert.RawIssuer, cert.RawSubject) {
			break
		}
		chain = append(chain, der)
	}
	if len(chain) > maxPOPChain {
		return nil, nil, fmt.Errorf("read the node's certificate in %s: there are %d certificates; the CA takes %d", x.CertFile, len(chain), maxPOPChain)
	}
	return chain, key, nil
}

// onlyKeys leaves the certificates of a common file out.
func onlyKeys(data []byte) []byte {
	var keys []byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			keys = append(keys, pem.EncodeToMemory(block)...)
		}
	}
	return keys
}

// Advice implements Attestor.
func (x *X509POP) Advice() string {
	return "see that " + x.CertFile + " is valid and below a root in node_attestors.x509pop.ca_file of the CA"
}

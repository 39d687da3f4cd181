// The settings of node attestation: which evidence, beside join tokens, proves
// that a machine is a node of this trust domain. What is not configured is
// refused.

package ca

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
)

// NodeAttestors are kinds of evidence. A kind that is not there is refused.
type NodeAttestors struct {
	X509POP *X509POP `yaml:"x509pop"`
}

// X509POP takes nodes that hold the key of a certificate.
type X509POP struct {
	// CAFile holds the roots in PEM below which nodes have their certificates. Who
	// has such a certificate for client authentication is a node. Required.
	CAFile string `yaml:"ca_file"`
	// Name is what a node is called by: public_key, the SHA-256 of its public key;
	// common_name; or dns_name, the only one. Default: public_key.
	Name string `yaml:"name"`
}

func (n NodeAttestors) validate() error {
	if p := n.X509POP; p != nil {
		if p.CAFile == "" {
			return fmt.Errorf("node_attestors.x509pop.ca_file: is missing: no certificate would prove a node")
		}
		if err := attest.CheckPOPName(p.name()); err != nil {
			return fmt.Errorf("node_attestors.x509pop.name: %w", err)
		}
	}
	return nil
}

func (p *X509POP) name() string {
	if p.Name == "" {
		return attest.POPNames()[0]
	}
	return p.Name
}

// open reads the files of what is configured.
func (n NodeAttestors) open(td spiffeid.TrustDomain) (attest.Attestors, error) {
	var all attest.Attestors
	if p := n.X509POP; p != nil {
		roots, err := readRoots(p.CAFile)
		if err != nil {
			return all, fmt.Errorf("node_attestors.x509pop.ca_file: %w", err)
		}
		all.POP = &attest.POP{TrustDomain: td, Roots: roots, Name: p.name()}
	}
	return all, nil
}

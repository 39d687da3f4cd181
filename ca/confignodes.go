// The settings of node attestation: which evidence, beside join tokens, proves
// that a machine is a node of this trust domain. What is not configured is
// refused.

package ca

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/oidc"
)

// NodeAttestors are kinds of evidence. A kind that is not there is refused.
type NodeAttestors struct {
	X509POP *X509POP     `yaml:"x509pop"`
	K8s     []K8sCluster `yaml:"k8s"`
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

// K8sCluster takes nodes of one Kubernetes cluster, by the token of the agent's
// pod there. Either issuer or api_server says how tokens are verified.
type K8sCluster struct {
	// Cluster names it; agents have it as k8s_cluster. Required.
	Cluster string `yaml:"cluster"`
	// Audience is the one that a token must be for: that of the projected volume.
	// Required.
	Audience string `yaml:"audience"`
	// ServiceAccounts are those of agents, "namespace:name". Required.
	ServiceAccounts []string `yaml:"service_accounts"`
	// Issuer is the cluster as its tokens name it (--service-account-issuer). Its
	// keys are in KeysFile or at KeysURL; with neither its discovery document says
	// where.
	Issuer   string `yaml:"issuer"`
	KeysURL  string `yaml:"keys_url"`
	KeysFile string `yaml:"keys_file"`
	// APIServer is the URL of the API server, which reviews each token; TokenFile
	// holds a token that may ask for that, and is read each time.
	APIServer string `yaml:"api_server"`
	TokenFile string `yaml:"token_file"`
	// CAFile holds the authorities of the TLS certificate of who is asked. Default:
	// the system's.
	CAFile string `yaml:"ca_file"`
}

func (n NodeAttestors) validate(td spiffeid.TrustDomain) error {
	seen := make(map[string]bool)
	for i, k := range n.K8s {
		err := k.validate(td)
		if err == nil && seen[k.Cluster] {
			err = fmt.Errorf("cluster: %q is there twice", k.Cluster)
		}
		if err != nil {
			return fmt.Errorf("node_attestors.k8s[%d].%w", i, err)
		}
		seen[k.Cluster] = true
	}
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

func (k K8sCluster) validate(td spiffeid.TrustDomain) error {
	if err := attest.CheckCluster(td, k.Cluster); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if len(k.ServiceAccounts) == 0 {
		return errors.New("service_accounts: are missing: no pod would be an agent")
	}
	for _, account := range k.ServiceAccounts {
		if namespace, name, ok := strings.Cut(account, ":"); !ok || namespace == "" || name == "" || strings.Contains(name, ":") {
			return fmt.Errorf("service_accounts: %q is not namespace:name", account)
		}
	}
	switch {
	case k.Issuer != "" && k.APIServer != "":
		return errors.New("api_server: issuer is set too; set one of them")
	case k.APIServer == "" && k.TokenFile != "":
		return errors.New("token_file: is for api_server, which is missing")
	case k.Issuer == "" && k.KeysURL+k.KeysFile != "":
		return errors.New("issuer: is missing")
	case k.KeysURL != "" && k.KeysFile != "":
		return errors.New("keys_file: keys_url is set too; set one of them")
	case k.Issuer == "" && k.APIServer == "":
		return errors.New("issuer: is missing, or api_server: nothing says whose tokens are good")
	case k.APIServer != "" && k.TokenFile == "":
		return errors.New("token_file: is missing: the API server would review nothing")
	case k.Issuer != "":
		return k.source(nil).ValidateSource()
	}
	// What is asked is what an issuer would be.
	if err := (oidc.Issuer{URL: k.APIServer, Audience: k.Audience}).ValidateSource(); err != nil {
		return errors.New(strings.Replace(err.Error(), "issuer:", "api_server:", 1))
	}
	return nil
}

func (k K8sCluster) source(roots *x509.CertPool) oidc.Issuer {
	return oidc.Issuer{URL: k.Issuer, Audience: k.Audience, KeysURL: k.KeysURL, KeysFile: k.KeysFile, Roots: roots}
}

func (k K8sCluster) open(td spiffeid.TrustDomain, log *slog.Logger) (*attest.Cluster, error) {
	roots, err := readRoots(k.CAFile)
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	c := &attest.Cluster{TrustDomain: td, Name: k.Cluster, Accounts: k.ServiceAccounts}
	if k.APIServer != "" {
		c.Tokens = attest.NewTokenReview(k.APIServer, k.Audience, k.TokenFile, oidc.HTTPClient(roots), log)
	} else {
		c.Tokens = attest.JWKS{Source: oidc.NewSource(k.source(roots), log)}
	}
	return c, nil
}

func (p *X509POP) name() string {
	if p.Name == "" {
		return attest.POPNames()[0]
	}
	return p.Name
}

// open reads the files of what is configured.
func (n NodeAttestors) open(td spiffeid.TrustDomain, log *slog.Logger) (attest.Attestors, error) {
	all := attest.Attestors{Clusters: make(map[string]*attest.Cluster)}
	for i, k := range n.K8s {
		c, err := k.open(td, log)
		if err != nil {
			return all, fmt.Errorf("node_attestors.k8s[%d].%w", i, err)
		}
		all.Clusters[k.Cluster] = c
	}
	if p := n.X509POP; p != nil {
		roots, err := readRoots(p.CAFile)
		if err != nil {
			return all, fmt.Errorf("node_attestors.x509pop.ca_file: %w", err)
		}
		all.POP = &attest.POP{TrustDomain: td, Roots: roots, Name: p.name()}
	}
	return all, nil
}

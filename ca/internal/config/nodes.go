// The settings of node attestation: which evidence, beside join tokens, proves
// that a machine is a node of this trust domain. What is not configured is
// refused.

package config

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/attest"
	"merlon.dev/ca/internal/oidc"
)

// NodeAttestors are kinds of evidence. A kind that is not there is refused.
type NodeAttestors struct {
	X509POP *X509POP     `yaml:"x509pop"`
	K8s     []K8sCluster `yaml:"k8s"`
	GCP     *GCP         `yaml:"gcp"`
	Azure   *Azure       `yaml:"azure"`
	AWS     *AWS         `yaml:"aws"`
}

// GCP takes instances of Google Compute Engine.
type GCP struct {
	// Audience is what the agents ask Google's tokens for, such as the URL of this
	// CA. Required.
	Audience string `yaml:"audience"`
	// Projects are the IDs of the projects whose instances are nodes. Required.
	Projects []string `yaml:"projects"`
	// KeysURL is where the issuer's keys are, and CAFile the authorities of that
	// server. Default: Google's, and the system's.
	KeysURL string `yaml:"keys_url"`
	CAFile  string `yaml:"ca_file"`
}

// Azure takes virtual machines of one tenant that have an identity assigned by
// the system.
type Azure struct {
	// Tenant is the ID of the tenant. Required.
	Tenant string `yaml:"tenant"`
	// Audience is what the agents ask tokens for: an application of your own, whose
	// tokens open nothing else. Required.
	Audience string `yaml:"audience"`
	// Subscriptions are the IDs of those whose machines are nodes. Required.
	Subscriptions []string `yaml:"subscriptions"`
	// KeysURL is where the issuer's keys are, and CAFile the authorities of that
	// server. Default: Azure's, and the system's.
	KeysURL string `yaml:"keys_url"`
	CAFile  string `yaml:"ca_file"`
}

// AWS takes instances of Amazon EC2.
type AWS struct {
	// Accounts are the IDs of those whose instances are nodes, 12 digits each.
	// Required.
	Accounts []string `yaml:"accounts"`
	// Certificates names, for each region whose instances are nodes, a file in PEM
	// with Amazon's certificate for the RSA-2048 signature of its identity documents,
	// or several while it changes. Required: none is built in.
	Certificates map[string]string `yaml:"certificates"`
	// MaxAge is how long after the start of an instance its document is taken.
	// Default: 1h.
	MaxAge time.Duration `yaml:"max_age"`
}

const defaultAWSMaxAge = time.Hour

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
	if g := n.GCP; g != nil {
		if err := checkCloud(g.source(nil), g.Projects, "projects"); err != nil {
			return fmt.Errorf("node_attestors.gcp.%w", err)
		}
	}
	if a := n.Azure; a != nil {
		if a.Tenant == "" {
			return errors.New("node_attestors.azure.tenant: is missing")
		}
		if !plainName.MatchString(a.Tenant) {
			return fmt.Errorf("node_attestors.azure.tenant: %q is not the ID of a tenant, such as 72f988bf-86f1-41af-91ab-2d7cd011db47", a.Tenant)
		}
		if err := checkCloud(a.source(nil), a.Subscriptions, "subscriptions"); err != nil {
			return fmt.Errorf("node_attestors.azure.%w", err)
		}
	}
	if a := n.AWS; a != nil {
		if err := a.validate(); err != nil {
			return fmt.Errorf("node_attestors.aws.%w", err)
		}
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

// plainName is what names in Kubernetes and IDs in Azure are made of.
var plainName = regexp.MustCompile(`^[0-9A-Za-z]([0-9A-Za-z.-]*[0-9A-Za-z])?$`)

func (k K8sCluster) validate(td spiffeid.TrustDomain) error {
	if err := attest.CheckCluster(td, k.Cluster); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	if len(k.ServiceAccounts) == 0 {
		return errors.New("service_accounts: are missing: no pod would be an agent")
	}
	for _, account := range k.ServiceAccounts {
		if namespace, name, ok := strings.Cut(account, ":"); !ok || !plainName.MatchString(namespace) || !plainName.MatchString(name) {
			return fmt.Errorf("service_accounts: %q is not namespace:name, as Kubernetes has names; no pattern stands for several", account)
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

// checkCloud wants a list of whose instances are nodes.
func checkCloud(issuer oidc.Issuer, whose []string, key string) error {
	if len(whose) == 0 || slices.Contains(whose, "") {
		return fmt.Errorf("%s: are missing: every instance of the cloud, or none, would be a node", key)
	}
	return issuer.ValidateSource()
}

func (a *AWS) validate() error {
	if len(a.Accounts) == 0 {
		return errors.New("accounts: are missing: every instance of the cloud, or none, would be a node")
	}
	for _, id := range a.Accounts {
		if err := attest.CheckAWSAccount(id); err != nil {
			return fmt.Errorf("accounts: %q: %w", id, err)
		}
	}
	if len(a.Certificates) == 0 {
		return errors.New("certificates: are missing: nothing says whose documents are good")
	}
	for region, file := range a.Certificates {
		if err := attest.CheckAWSRegion(region); err != nil {
			return fmt.Errorf("certificates: %q: %w", region, err)
		}
		if file == "" {
			return fmt.Errorf("certificates: %s: names no file", region)
		}
	}
	if a.MaxAge < 0 {
		return fmt.Errorf("max_age: %v is less than nothing", a.MaxAge)
	}
	return nil
}

// open reads the certificates. One that would verify nothing is an error.
func (a *AWS) open(td spiffeid.TrustDomain) (*attest.AWS, error) {
	opened := &attest.AWS{TrustDomain: td, Accounts: a.Accounts, Certificates: make(map[string][]*x509.Certificate), MaxAge: cmp.Or(a.MaxAge, defaultAWSMaxAge)}
	for region, file := range a.Certificates {
		certs, err := readCertificates(file)
		if err != nil {
			return nil, fmt.Errorf("certificates: %s: %w", region, err)
		}
		for _, c := range certs {
			if err := attest.CheckAWSCertificate(c); err != nil {
				return nil, fmt.Errorf("certificates: %s: a certificate in %s is of no use: %w", region, file, err)
			}
		}
		opened.Certificates[region] = certs
	}
	return opened, nil
}

func (g *GCP) source(roots *x509.CertPool) oidc.Issuer {
	return oidc.Issuer{URL: attest.GCPIssuer, Audience: g.Audience, KeysURL: cmp.Or(g.KeysURL, attest.GCPKeysURL), Roots: roots}
}

func (a *Azure) source(roots *x509.CertPool) oidc.Issuer {
	return oidc.Issuer{URL: attest.AzureIssuer(a.Tenant), Audience: a.Audience, KeysURL: cmp.Or(a.KeysURL, attest.AzureKeysURL(a.Tenant)), Roots: roots}
}

// lowered: Azure's IDs are the same in capitals.
func lowered(ids []string) []string {
	low := make([]string, len(ids))
	for i, id := range ids {
		low[i] = strings.ToLower(id)
	}
	return low
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

// readCertificates reads a file with certificates in PEM and nothing else.
func readCertificates(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	block, rest := pem.Decode(data)
	for ; block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s holds a %s that does not parse as a certificate", path, block.Type)
		}
		certs = append(certs, c)
	}
	if len(data) > maxCAFile || len(certs) == 0 || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM, or something else beside, or is too large", path)
	}
	return certs, nil
}

// Open reads the files of what is configured.
func (n NodeAttestors) Open(td spiffeid.TrustDomain, log *slog.Logger) (attest.Attestors, error) {
	all := attest.Attestors{Clusters: make(map[string]*attest.Cluster)}
	for i, k := range n.K8s {
		c, err := k.open(td, log)
		if err != nil {
			return all, fmt.Errorf("node_attestors.k8s[%d].%w", i, err)
		}
		all.Clusters[k.Cluster] = c
	}
	if g := n.GCP; g != nil {
		roots, err := readRoots(g.CAFile)
		if err != nil {
			return all, fmt.Errorf("node_attestors.gcp.ca_file: %w", err)
		}
		all.GCP = &attest.GCP{TrustDomain: td, Projects: g.Projects, Source: oidc.NewSource(g.source(roots), log)}
	}
	if a := n.Azure; a != nil {
		roots, err := readRoots(a.CAFile)
		if err != nil {
			return all, fmt.Errorf("node_attestors.azure.ca_file: %w", err)
		}
		all.Azure = &attest.Azure{TrustDomain: td, Tenant: a.Tenant, Subscriptions: lowered(a.Subscriptions), Source: oidc.NewSource(a.source(roots), log)}
	}
	if a := n.AWS; a != nil {
		var err error
		if all.AWS, err = a.open(td); err != nil {
			return all, fmt.Errorf("node_attestors.aws.%w", err)
		}
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

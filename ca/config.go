// Package ca is the certificate authority of a trust domain as a service: it
// proves agents, keeps registration entries, issues SVIDs, publishes policy and
// trust bundles. New makes one from a Config, Run serves until its context
// ends.
package ca

import "merlon.dev/ca/internal/config"

// What a Server is made from: each setting says what it is, and its default, in
// ca/internal/config.
type (
	Config         = config.Config
	Admin          = config.Admin
	OIDC           = config.OIDC
	OIDCRole       = config.OIDCRole
	BundleEndpoint = config.BundleEndpoint
	ACME           = config.ACME
	NodeAttestors  = config.NodeAttestors
	K8sCluster     = config.K8sCluster
	GCP            = config.GCP
	Azure          = config.Azure
	AWS            = config.AWS
	X509POP        = config.X509POP
)

// ReadConfig reads a YAML file. Unknown keys are errors.
func ReadConfig(path string) (Config, error) { return config.ReadFile(path) }

// Package ca is the certificate authority of a trust domain as a service: it
// proves agents, keeps registration entries, issues SVIDs, publishes policy and
// trust bundles. New makes one from a Config, Run serves until its context
// ends.
package ca

import "merlon.dev/ca/internal/config"

type (
	// Config is what a Server is made from; ca/internal/config says what each setting
	// is, and its default.
	Config = config.Config
	// Admin is a user of this machine with a role.
	Admin = config.Admin
	// OIDC is a provider whose tokens administer the CA, OIDCRole what they may do.
	OIDC = config.OIDC
	// OIDCRole gives a role to tokens.
	OIDCRole = config.OIDCRole
	// BundleEndpoint is the endpoint for those who know nothing of SPIFFE yet.
	BundleEndpoint = config.BundleEndpoint
	// ACME says who issues the certificate of that endpoint.
	ACME = config.ACME
	// NodeAttestors are the kinds of evidence that prove a node.
	NodeAttestors = config.NodeAttestors
	// K8sCluster is a cluster whose tokens prove one.
	K8sCluster = config.K8sCluster
	// GCP says whose instances in Google's cloud are nodes.
	GCP = config.GCP
	// Azure says it for Microsoft's.
	Azure = config.Azure
	// AWS says it for Amazon's.
	AWS = config.AWS
	// X509POP says whose certificates prove a node.
	X509POP = config.X509POP
)

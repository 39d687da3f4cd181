// Google Compute Engine: an identity token of the instance, in which Google says
// which instance it is.

package attest

import (
	"context"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/entry"
	"merlon.dev/ca/internal/oidc"
)

// GCPKind is the kind of evidence in an agent's record.
const GCPKind = "gcp"

// Where Google's tokens come from.
const (
	GCPIssuer  = "https://accounts.google.com"
	GCPKeysURL = "https://www.googleapis.com/oauth2/v3/certs"
)

// GCP proves instances of Google's. It is safe for concurrent use.
type GCP struct {
	TrustDomain spiffeid.TrustDomain
	// Projects are whose instances are nodes.
	Projects []string
	// Source verifies tokens of GCPIssuer.
	Source *oidc.Source
}

// Prove says which instance's the token is.
func (g *GCP) Prove(ctx context.Context, token string, now time.Time) (*Node, error) {
	claims, err := instanceClaims(ctx, GCPKind, g.Source, token, now)
	if err != nil {
		return nil, err
	}
	// Who may use a service account can have tokens made for it anywhere; only the
	// instance's own names the instance.
	instance := object(object(claims, "google"), "compute_engine")
	project, id := text(instance, "project_id"), text(instance, "instance_id")
	if project == "" || id == "" {
		return nil, refused(GCPKind, NotProved, "the token names no instance: it has to come from the metadata server, with format=full")
	}
	if !slices.Contains(g.Projects, project) {
		return nil, refused(GCPKind, NotAllowed, "project %.100q is not among node_attestors.gcp.projects", project)
	}
	spiffeID, err := entry.AttestedID(g.TrustDomain, GCPKind, project, id)
	if err != nil {
		return nil, refused(GCPKind, NotAllowed, "project %.100q and instance %.100q cannot be a node's name: each has to be a path segment of a SPIFFE ID", project, id)
	}
	f := facts{kind: GCPKind}
	f.add("project", project)
	f.add("zone", text(instance, "zone"))
	f.add("instance-id", id)
	f.add("instance-name", text(instance, "instance_name"))
	if claims["email_verified"] == true {
		f.add("service-account", text(claims, "email"))
	}
	return (&Node{ID: spiffeID, Kind: GCPKind, Selectors: f.list}).once([]byte(token), endOf(claims)), nil
}

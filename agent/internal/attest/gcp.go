// Google Compute Engine: an identity token of the instance, by the metadata server.

package attest

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net/url"
	"strings"

	"merlon.dev/ca/capb"
)

const gcpMetadata = "http://metadata.google.internal"

// GCP shows a token that names the instance.
type GCP struct {
	// Audience is what the CA expects.
	Audience string
	// Server is the metadata server; empty for Google's.
	Server string
}

// Kind implements Attestor.
func (*GCP) Kind() string { return "gcp" }

// Evidence implements Attestor.
func (g *GCP) Evidence(ctx context.Context, _ tls.ConnectionState, req *capb.AttestRequest) error {
	query := url.Values{"audience": {g.Audience}, "format": {"full"}}
	header, body, err := metadataServer(cmp.Or(g.Server, gcpMetadata)).get(ctx, "/computeMetadata/v1/instance/service-accounts/default/identity", query, "Metadata-Flavor", "Google")
	if err != nil {
		return fmt.Errorf("ask for the instance's identity token: %w: is this an instance of Compute Engine with a service account?", err)
	}
	if header.Get("Metadata-Flavor") != "Google" {
		return fmt.Errorf("ask for the instance's identity token: what answers is not Google's metadata server")
	}
	req.Evidence = &capb.AttestRequest_GcpToken{GcpToken: strings.TrimSpace(string(body))}
	return nil
}

// Advice implements Attestor.
func (*GCP) Advice() string {
	return "compare node_audience with node_attestors.gcp of the CA" + attestedBefore
}

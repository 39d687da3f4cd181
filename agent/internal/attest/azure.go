// Azure: a token of the identity that is assigned to the virtual machine, by the
// metadata server.

package attest

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"merlon.dev/ca/capb"
)

// Azure shows a token that names the virtual machine.
type Azure struct {
	// Audience is what the CA expects.
	Audience string
	// Server is the metadata server; empty for Azure's.
	Server string
}

// Kind implements Attestor.
func (*Azure) Kind() string { return "azure" }

// Evidence implements Attestor.
func (a *Azure) Evidence(ctx context.Context, _ tls.ConnectionState, req *capb.AttestRequest) error {
	query := url.Values{"resource": {a.Audience}, "api-version": {"2018-02-01"}}
	_, body, err := metadataServer(cmp.Or(a.Server, linkLocal)).get(ctx, "/metadata/identity/oauth2/token", query, "Metadata", "true")
	if err != nil {
		return fmt.Errorf("ask for the machine's token: %w: is this a virtual machine of Azure with a system-assigned identity?", err)
	}
	token, err := accessToken(body)
	if err != nil {
		return fmt.Errorf("ask for the machine's token: %w", err)
	}
	req.Evidence = &capb.AttestRequest_AzureToken{AzureToken: token}
	return nil
}

// accessToken reads an answer of the metadata server.
func accessToken(body []byte) (string, error) {
	var answer struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(body, &answer); err != nil || answer.AccessToken == "" {
		return "", errors.New("the answer holds no access_token")
	}
	return answer.AccessToken, nil
}

// Advice implements Attestor.
func (*Azure) Advice() string {
	return "compare node_audience with node_attestors.azure of the CA" + attestedBefore
}

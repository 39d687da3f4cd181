// Amazon EC2: the identity document of the instance, as the metadata service
// signs it with the region's RSA 2048 key. The service is asked in its second
// version, by a session token, and never in its first: what can be made to send a
// plain GET for somebody else gets no document.

package attest

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"merlon.dev/ca/capb"
)

const (
	awsSessionSeconds  = "60"
	maxAWSSessionToken = 4 << 10
)

// AWS shows the document that names the instance.
type AWS struct {
	// Server is the metadata service; empty for Amazon's.
	Server string
}

// Kind implements Attestor.
func (*AWS) Kind() string { return "aws" }

// Evidence implements Attestor.
func (a *AWS) Evidence(ctx context.Context, _ tls.ConnectionState, req *capb.AttestRequest) error {
	message, err := a.message(ctx)
	if err != nil {
		return fmt.Errorf("ask for the instance's identity document: %w", err)
	}
	signed, err := openSigned(message)
	if err != nil {
		return fmt.Errorf("read the instance's identity document: %w", err)
	}
	req.Evidence = &capb.AttestRequest_AwsDocument{AwsDocument: &capb.AwsDocument{
		Document: signed.content, SignedAttributes: signed.attributes, Signature: signed.signature,
	}}
	return nil
}

// message is the PKCS #7 message in which the document is.
func (a *AWS) message(ctx context.Context) ([]byte, error) {
	server := metadataServer(cmp.Or(a.Server, linkLocal))
	_, token, err := server.ask(ctx, http.MethodPut, "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds", awsSessionSeconds)
	if err != nil {
		return nil, fmt.Errorf("%w: is this an instance of EC2? In a container the service answers only with a hop limit of 2 (HttpPutResponseHopLimit)", err)
	}
	if len(token) == 0 || len(token) > maxAWSSessionToken || strings.ContainsFunc(string(token), func(c rune) bool { return c <= ' ' || c > '~' }) {
		return nil, errors.New("what answers for a session token sends none: it is not Amazon's metadata service")
	}
	_, text, err := server.get(ctx, "/latest/dynamic/instance-identity/rsa2048", nil, "X-aws-ec2-metadata-token", string(token))
	if err != nil {
		return nil, err
	}
	message, err := base64.StdEncoding.DecodeString(string(text)) // it passes line breaks over
	if err != nil {
		return nil, fmt.Errorf("the answer is no PKCS #7 message in base64: %w", err)
	}
	return message, nil
}

// Advice implements Attestor.
func (*AWS) Advice() string {
	return "see that node_attestors.aws of the CA has the instance's account, the certificate of its region, and a max_age that is not over" + attestedBefore + ", and then stopped and started"
}

// The agent's own SVID, after its end: what brings a node back whose other
// evidence is good once.

package attest

import (
	"context"
	"crypto/tls"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/possession"
)

// OwnSVID shows the last SVID that the agent got.
type OwnSVID struct{ SVID *x509svid.SVID }

// Kind implements Attestor.
func (*OwnSVID) Kind() string { return "own_svid" }

// Evidence implements Attestor.
func (o *OwnSVID) Evidence(_ context.Context, conn tls.ConnectionState, req *capb.AttestRequest) error {
	statement, err := possession.Statement(conn, req.GetCsr())
	if err != nil {
		return err
	}
	signature, err := possession.Sign(o.SVID.PrivateKey, statement)
	if err != nil {
		return fmt.Errorf("by the agent's own SVID: %w", err)
	}
	var chain [][]byte
	for _, cert := range o.SVID.Certificates {
		chain = append(chain, cert.Raw)
	}
	req.Evidence = &capb.AttestRequest_OwnSvid{OwnSvid: &capb.OwnSvid{Chain: chain, Signature: signature}}
	return nil
}

// Advice implements Attestor.
func (*OwnSVID) Advice() string {
	return "run `merlon token create` and set join_token or join_token_file"
}

// Package attest makes the evidence with which the agent proves its node to the
// CA. It is read anew at each attempt, so that an operator can put it there
// while the agent runs. One file per kind, called as the CA's that checks it.
package attest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"

	"merlon.dev/ca/capb"
)

// Attestor makes evidence of one kind. It is safe for concurrent use.
type Attestor interface {
	// Kind is that of the evidence, as it is configured: "join_token".
	Kind() string
	// Evidence puts what proves the node into req, whose CSR is there already. It
	// is for the CA at the other end of conn, which has been verified.
	Evidence(ctx context.Context, conn tls.ConnectionState, req *capb.AttestRequest) error
	// Advice is what an operator does when the CA refuses the evidence.
	Advice() string
}

// ErrNone says that there is no evidence to send.
var ErrNone = errors.New("the agent has no valid SVID of its own and no evidence")

// readFile reads a file of at most limit bytes; what names it for errors.
func readFile(what, path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", what, err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: %s has more than %d bytes", what, path, limit)
	}
	return data, nil
}

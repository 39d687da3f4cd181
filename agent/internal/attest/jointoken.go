// Join tokens: once.

package attest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"merlon.dev/ca/capb"
)

const maxTokenBytes = 4096

// JoinToken sends the token that an operator made.
type JoinToken struct {
	// Token, or else File, holds it; empty for none.
	Token, File string
}

// Kind implements Attestor.
func (*JoinToken) Kind() string { return "join_token" }

// Evidence implements Attestor.
func (j *JoinToken) Evidence(_ context.Context, _ tls.ConnectionState, req *capb.AttestRequest) error {
	token, err := j.read()
	if err != nil {
		return err
	}
	if token == "" {
		return fmt.Errorf("%w: run `merlon token create` and set join_token or join_token_file", ErrNone)
	}
	req.Evidence = &capb.AttestRequest_JoinToken{JoinToken: token}
	return nil
}

func (j *JoinToken) read() (string, error) {
	if j.File == "" {
		return j.Token, nil
	}
	data, err := readFile("the join token", j.File, maxTokenBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(data)), err
}

// Advice implements Attestor.
func (*JoinToken) Advice() string { return "run `merlon token create` and replace it" }

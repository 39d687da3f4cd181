// Steps of the JWT keys of nested CAs: taken in the store of the CA above, which
// sees everybody who counts, asked for by the one that holds the key.

package ca

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/upstream"
)

// TakeFor implements api.Authorities.
func (a *authorities) TakeFor(ctx context.Context, name string, c rotation.Command) (uint64, error) {
	_, revision, err := a.takeIf(ctx, c, func(set rotation.Set) error {
		subject := c.New
		if c.Verb != rotation.Prepare {
			var ok bool
			if subject, ok = set.Get(c.ID); !ok {
				return fmt.Errorf("%s %.80q: %w", c.Verb, c.ID, rotation.ErrUnknown)
			}
		}
		switch {
		case subject.Kind == rotation.Root:
			return status.Errorf(codes.PermissionDenied, "%s %s: it is a root, and no JWT key of nested CA %s: roots are stepped at the CA above alone", c.Verb, c.ID, name)
		case subject.Kind != rotation.JWT || subject.Replica != name:
			return status.Errorf(codes.PermissionDenied, "%s %s: it is no JWT key of nested CA %s: its steps are taken at the CA that holds it", c.Verb, c.ID, name)
		}
		return nil
	})
	return revision, err
}

// step has the CA above take a step, and puts down what is so then. It returns the
// revision that wrote it here.
func (u *above) step(ctx context.Context, c rotation.Command) (uint64, error) {
	req := &capb.StepRequest{Verb: string(c.Verb), AuthorityId: c.ID, Force: c.Force}
	if c.Verb == rotation.Prepare {
		csr, err := u.keys.JWTRequest(c.New.ID)
		if err != nil {
			return 0, err
		}
		req.JwtCsr = csr
	}
	var resp *capb.StepResponse
	err := u.call(ctx, func(ctx context.Context, ca capb.NestedClient) (err error) {
		resp, err = ca.Step(ctx, req)
		return err
	})
	switch status.Code(err) {
	case codes.OK:
	case codes.FailedPrecondition, codes.PermissionDenied: // of this CA, and not of who asks it
		reason := strings.TrimPrefix(status.Convert(err).Message(), fmt.Sprintf("%s %s: ", c.Verb, c.ID))
		return 0, &rotation.RefusedError{Verb: c.Verb, ID: c.ID, Reason: reason}
	case codes.NotFound:
		return 0, fmt.Errorf("%s %.80q: %w", c.Verb, c.ID, rotation.ErrUnknown)
	case codes.Unavailable, codes.DeadlineExceeded:
		return 0, status.Errorf(codes.FailedPrecondition, "%s %s: the CA above, at %s, judges this, and does not answer: %s", c.Verb, c.ID, u.address, status.Convert(err).Message())
	default:
		return 0, err
	}
	revision, err := u.mirror.Apply(ctx, stateOf(resp.GetState()))
	if err == nil && revision == 0 {
		revision = u.registry.Revision()
	}
	return revision, err
}

// spareJWT is a JWT key that is here and that nobody knows: of an earlier attempt to
// prepare one, which the CA above did not answer. Each would leave one otherwise.
func (a *authorities) spareJWT() (spare upstream.JWTKey, ok bool) {
	keys, err := a.keys.JWTKeys()
	if err != nil {
		return spare, false
	}
	set := a.registry.Authorities()
	for _, key := range keys {
		if _, known := set.Get(key.KeyID); !known {
			return key, true
		}
	}
	return spare, false
}

// errNoState is returned where the CA above leaves out what a nested CA needs.
var errNoState = errors.New("the CA above takes this one for a replica: its answer lacks what a nested CA keeps in its store")

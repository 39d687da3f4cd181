// Steps of authorities and the audit log.

package api

import (
	"context"
	"errors"
	"strings"
	"testing"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
)

// TestStepThatCannotBeRecordedIsNotTaken: the service has nobody here who could
// take one.
func TestStepThatCannotBeRecordedIsNotTaken(t *testing.T) {
	s, _ := newService(t)
	if err := s.opts.Audit.Close(); err != nil {
		t.Fatal(err)
	}
	ctx := context.WithValue(t.Context(), callerKey{}, &Caller{Name: "uid:0"})
	_, err := s.ActivateAuthority(ctx, &capb.ActivateAuthorityRequest{AuthorityId: "a1", Force: true})
	if !errors.Is(err, audit.ErrClosed) || !strings.Contains(err.Error(), "activate authority by force was not done") {
		t.Errorf("ActivateAuthority without an audit log = %v", err)
	}
}

// A picture that lags is no rollback.

package api

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/store"
)

// ahead is a store that other replicas write; this one's registry does not see
// it before write is called.
type ahead struct {
	store.Store
	revision uint64
	err      error
	write    func()
}

func (a ahead) Revision(context.Context) (uint64, error) {
	if a.write != nil {
		a.write()
	}
	return a.revision, a.err
}

func TestReplicaThatLagsWaitsAndOneThatIsCutOffRefuses(t *testing.T) {
	s, agent := newService(t)
	caller := &Caller{Name: agent.ID.String(), Kinds: []capb.Caller{capb.Caller_CALLER_AGENT}}
	st := s.opts.Store
	now, err := st.Revision(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	next := &capb.Seen{Revision: now + 1}

	s.opts.Store = ahead{Store: st, revision: now + 1, write: func() {
		if _, err := st.Txn(t.Context(), nil, []store.Op{store.Put("x", nil)}, nil); err != nil {
			t.Error(err)
		}
	}}
	if err := s.checkSeen(t.Context(), caller, next); err != nil {
		t.Errorf("what the agent saw comes with the next batch: %v", err)
	}
	later := &capb.Seen{Revision: now + 2}
	s.opts.Store = ahead{Store: st, err: fmt.Errorf("no quorum: %w", store.ErrUnavailable)}
	if err := s.checkSeen(t.Context(), caller, later); status.Code(err) != codes.Unavailable {
		t.Errorf("a store that does not answer: %v; want Unavailable, for it may be the picture that lags", err)
	}
	broken := errors.New("broken")
	s.opts.Store = ahead{Store: st, err: broken}
	if err := s.checkSeen(t.Context(), caller, later); !errors.Is(err, broken) {
		t.Errorf("a store that fails: %v", err)
	}
	s.opts.Store = ahead{Store: st, revision: now + 1}
	if err := s.checkSeen(t.Context(), caller, later); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a store that has less: %v; want FailedPrecondition", err)
	}
}

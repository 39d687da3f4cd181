// Two administrators at once: the one who comes second is told, and an older trust
// bundle does not slip in between looking and writing.

package api

import (
	"context"
	"fmt"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.test")

// meanwhile is a store in which somebody writes right after the next look at a
// federated trust bundle.
type meanwhile struct {
	store.Store
	write func()
}

func (m *meanwhile) Get(ctx context.Context, key string) (store.KV, uint64, error) {
	kv, revision, err := m.Store.Get(ctx, key)
	if write := m.write; write != nil && key == trust.FederatedPrefix+"partner.test" {
		m.write = nil
		write()
	}
	return kv, revision, err
}

func TestTrustBundleIsNotSetOverAnotherSetMeanwhile(t *testing.T) {
	s, _ := newService(t)
	m := &meanwhile{Store: s.opts.Store}
	s.opts.Store = m
	ctx := context.WithValue(t.Context(), callerKey{}, &Caller{Name: "test"})
	set := func(sequence int) error {
		_, err := s.SetFederatedBundle(ctx, &capb.SetFederatedBundleRequest{
			TrustDomain: "partner.test", Document: fmt.Appendf(nil, `{"keys":[],"spiffe_sequence":%d}`, sequence),
		})
		return err
	}
	while := func(sequence int) {
		m.write = func() {
			if err := set(sequence); err != nil {
				t.Error(err)
			}
		}
	}
	want := func(what string, err error, sequence uint64) {
		t.Helper()
		b, _, readErr := s.heldFederated(ctx, partner)
		if readErr != nil || b.Sequence != sequence || status.Code(err) != codes.Aborted {
			t.Errorf("%s: %v, then %+v, %v; want Aborted, and %d to stay", what, err, b, readErr, sequence)
		}
	}
	while(9)
	want("the first", set(4), 9)
	while(12)
	want("another", set(11), 12)
	while(13)
	_, err := s.RemoveFederatedBundle(ctx, &capb.RemoveFederatedBundleRequest{TrustDomain: "partner.test"})
	want("a removal", err, 13)
}

// Eviction against what happens at the same time, and what a replica says of
// itself afterwards.

package api

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/release"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/sdk/svid"
)

// overtaken is a store in which somebody else is faster, once.
type overtaken struct {
	store.Store
	by func()
}

func (o *overtaken) Txn(ctx context.Context, cmps []store.Cmp, then, otherwise []store.Op) (store.TxnResult, error) {
	if by := o.by; by != nil {
		o.by = nil
		by()
	}
	return o.Store.Txn(ctx, cmps, then, otherwise)
}

// overtake has something happen between what the next transaction was decided by
// and the transaction itself.
func (s *Service) overtake(by func()) {
	s.opts.Store = &overtaken{Store: s.opts.Store, by: by}
}

// An authority that is certified while its replica is evicted is withdrawn too.
func TestEvictionReachesAnAuthorityThatIsCertifiedMeanwhile(t *testing.T) {
	s, _ := newRootHolder(t)
	s.joined(t, newJoiner(t), "ca-2")
	st := s.opts.Store
	s.overtake(func() {
		rec, err := replica.Read(t.Context(), st, "ca-2")
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		put, err := rec.WithAuthority(replica.Authority{ID: "0a0b", NotAfter: now.Add(time.Hour)}, now).Put()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Txn(t.Context(), nil, []store.Op{put}, nil); err != nil {
			t.Fatal(err)
		}
	})
	resp, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "ca-2"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(resp.GetRevocations(), func(r *capb.Revocation) bool { return r.GetAuthorityId() == "0a0b" }) {
		t.Errorf("revoked %v; want the authority that came in between, too", resp.GetRevocations())
	}
}

// An authority that is revoked while its replica is certified: it gets nothing,
// whoever of the two was first.
func TestCertifyOfAReplicaThatIsRevokedMeanwhileIsRefused(t *testing.T) {
	s, _ := newRootHolder(t)
	j := newJoiner(t)
	joined := s.joined(t, j, "ca-2")
	authority := certID(t, joined.GetIntermediate()[0])
	caller := s.PeerCaller(s.peerUnder(t, authority, certID(t, joined.GetRoot())))
	st := s.opts.Store
	s.overtake(func() {
		put, _, err := revocation.Put(0, svid.Revocation{AuthorityID: authority, ExpiresAt: time.Now().Add(time.Hour)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Txn(t.Context(), nil, []store.Op{put}, nil); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := s.Certify(as(t, caller), &capb.ReplicaCertifyRequest{Keys: j.keys(t)}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Certify = %v; want PermissionDenied", err)
	}
}

// Policy is signed anew before the replica goes, so that none is ever without a
// key, and once more after it: it may have pushed in between. That the set of
// keys is another is announced with the eviction itself.
func TestEvictionSignsPolicyAnewBeforeAndAfter(t *testing.T) {
	s, _ := newRootHolder(t)
	s.joined(t, newJoiner(t), "ca-2")
	var there []bool
	s.opts.Reseal = func(ctx context.Context, key replica.PolicyKey) ([]*release.Head, error) {
		_, err := replica.Read(ctx, s.opts.Store, key.Replica)
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			t.Error(err)
		}
		there = append(there, err == nil)
		return nil, nil
	}
	before, _, err := s.opts.Store.Get(t.Context(), replica.MarkKey)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "ca-2"}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(there, []bool{true, false}) {
		t.Errorf("signed anew with the replica there: %v; want once with it, once without", there)
	}
	if after, _, err := s.opts.Store.Get(t.Context(), replica.MarkKey); err != nil || after.ModRevision <= before.ModRevision {
		t.Errorf("the mark is of revision %d, and was of %d, %v; want it written", after.ModRevision, before.ModRevision, err)
	}
}

// A replica that joined again under its name, elsewhere, is not the one before.
func TestStandingIsThatOfTheKeys(t *testing.T) {
	s, keys := newRootHolder(t)
	s.joined(t, newJoiner(t), "ca-2")
	s.opts.Root, s.opts.ReplicaName = nil, "ca-2"
	if err := s.Standing(); !errors.Is(err, ErrEvicted) || status.Code(err) != codes.Unavailable {
		t.Errorf("with other keys than its record says: %v; want ErrEvicted", err)
	}
	rec, _ := s.registry.Replica("ca-2")
	own := *rec
	own.JWTKeyID = keys.JWT().KeyID
	put, err := own.Put()
	if err != nil {
		t.Fatal(err)
	}
	write(t, s, put)
	if err := s.Standing(); err != nil {
		t.Errorf("with its own: %v", err)
	}
	write(t, s, store.Delete(replica.Prefix+"ca-2"))
	if err := s.Standing(); !errors.Is(err, ErrEvicted) {
		t.Errorf("without a record: %v; want ErrEvicted", err)
	}
}

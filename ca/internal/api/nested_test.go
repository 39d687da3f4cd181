// Nested CAs at the door of the one above: how one joins, what it may say, and what
// is taken from it.

package api

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/registry"
	"merlon.dev/ca/internal/replica"
	"merlon.dev/ca/internal/revocation"
	"merlon.dev/ca/internal/rotation"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/trust"
	"merlon.dev/sdk/svid"
)

func (s *Service) nestedToken(t *testing.T, name string) string {
	t.Helper()
	resp, err := s.CreateToken(as(t, admin()), &capb.CreateTokenRequest{Kind: capb.TokenKind_TOKEN_KIND_NESTED_CA, ReplicaName: name})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetToken()
}

// below lets a nested CA join, and returns it as a caller.
func (s *Service) below(t *testing.T, name string) *Caller {
	t.Helper()
	resp, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: s.nestedToken(t, name), Keys: newJoiner(t).keys(t), OwnStore: true})
	if err != nil {
		t.Fatal(err)
	}
	rec, ok := s.registry.Replica(name)
	if !ok {
		t.Fatalf("nested CA %s has no record", name)
	}
	if resp.GetCertificates().GetState() == nil {
		t.Errorf("nested CA %s was told nothing that it keeps in its store", name)
	}
	return s.PeerCaller(s.peerUnder(t, rec.Current().ID, "root"))
}

func TestNestedCAIsKnownByItsAuthority(t *testing.T) {
	s, _ := newRootHolder(t)
	eu, us := s.below(t, "eu"), s.below(t, "us")
	if !eu.Is(capb.Caller_CALLER_NESTED_CA) || eu.Is(capb.Caller_CALLER_REPLICA) || eu.Replica.Realm != 1 || us.Replica.Realm != 2 {
		t.Errorf("kinds %v, realms %d and %d; want a nested CA, 1 and 2", eu.Kinds, eu.Replica.Realm, us.Replica.Realm)
	}
	// Its revisions are of its own store: nobody waits for the picture to get there.
	ahead := s.peerUnder(t, eu.Replica.Current().ID, "root")
	ahead.Serial = svid.Serial{Realm: 1, Revision: svid.MaxRevision, Random: 1}
	if c := s.PeerCaller(ahead); c.Unsure != "" || !c.Is(capb.Caller_CALLER_NESTED_CA) {
		t.Errorf("one whose store is ahead of ours: %q, %v; want it taken for what it is", c.Unsure, c.Kinds)
	}
	// A realm is nobody's again, also when its CA has gone.
	if _, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "us"}); err != nil {
		t.Fatal(err)
	}
	if again := s.below(t, "us"); again.Replica.Realm != 3 {
		t.Errorf("the next one has realm %d; want 3", again.Replica.Realm)
	}
	gone := s.PeerCaller(us.Peer)
	if err := s.access.authorize(gone, capb.Nested_Follow_FullMethodName); status.Code(err) != codes.PermissionDenied || !WasEvicted(err) {
		t.Errorf("one that was evicted is told %v; want PERMISSION_DENIED, which says so", err)
	}
	// Whoever is let in for nothing for another reason is not told that.
	for name, c := range map[string]*Caller{"at another door": {Name: "ca", Kinds: []capb.Caller{capb.Caller_CALLER_REPLICA}}, "nobody": Anonymous()} {
		if err := s.access.authorize(c, capb.Nested_Follow_FullMethodName); status.Code(err) != codes.PermissionDenied || WasEvicted(err) {
			t.Errorf("%s: told %v; want PERMISSION_DENIED, and no eviction", name, err)
		}
	}
}

// What a nested CA may call, beside what anybody may.
func TestNestedCAMayCallNothingElse(t *testing.T) {
	s, _ := newRootHolder(t)
	eu := s.below(t, "eu")
	var may []string
	for method := range s.access {
		_, anybody := s.access.permits(method, Anonymous())
		if _, ok := s.access.permits(method, eu); ok && !anybody {
			may = append(may, method)
		}
	}
	slices.Sort(may)
	want := []string{capb.Nested_Follow_FullMethodName, capb.Nested_Step_FullMethodName, capb.Replica_Certify_FullMethodName}
	if !slices.Equal(may, want) {
		t.Errorf("a nested CA may call %v; want %v", may, want)
	}
}

func TestTokenOfTheOtherKindStaysGood(t *testing.T) {
	s, _ := newRootHolder(t)
	keys := newJoiner(t).keys(t)
	for _, test := range []struct {
		token    string
		ownStore bool
	}{{s.replicaToken(t, "ca-2"), true}, {s.nestedToken(t, "eu"), false}} {
		req := &capb.ReplicaJoinRequest{Token: test.token, Keys: keys, OwnStore: test.ownStore}
		if _, err := s.Join(as(t, Anonymous()), req); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("join with the other kind of token: %v; want FAILED_PRECONDITION", err)
		}
		req.OwnStore = !test.ownStore
		if _, err := s.Join(as(t, Anonymous()), req); err != nil {
			t.Errorf("the token is spent: %v", err)
		}
		keys = newJoiner(t).keys(t)
	}
}

func TestRealmsEnd(t *testing.T) {
	s, _ := newRootHolder(t)
	for value, want := range map[string]codes.Code{"255": codes.ResourceExhausted, "x": codes.Internal} {
		if _, err := s.opts.Store.Txn(t.Context(), nil, []store.Op{store.Put(replica.RealmKey, []byte(value))}, nil); err != nil {
			t.Fatal(err)
		}
		_, err := s.Join(as(t, Anonymous()), &capb.ReplicaJoinRequest{Token: s.nestedToken(t, "eu"), Keys: newJoiner(t).keys(t), OwnStore: true})
		if status.Code(err) != want {
			t.Errorf("join after realm %s: %v; want %s", value, err, want)
		}
	}
}

const someID = "0123456789abcdef0123456789abcdef"

// revoked is a revocation of /web as a nested CA of realm 1 tells it.
func revoked(edit func(*capb.SharedRevocation)) *capb.SharedRevocation {
	p := &capb.SharedRevocation{Id: someID, Revocation: &capb.Revocation{
		Subject:        &capb.Revocation_SpiffeId{SpiffeId: td.IDString() + "/web"},
		BeforeRevision: 7, Realm: 1, ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
	}}
	edit(p)
	return p
}

func TestRevocationsFromBelow(t *testing.T) {
	for name, test := range map[string]struct {
		edit    func(*capb.SharedRevocation)
		records int // of what is stored then
		refused bool
	}{
		"of a SPIFFE ID": {func(*capb.SharedRevocation) {}, 2, false},
		"derived":        {func(p *capb.SharedRevocation) { p.Derived = true }, 1, false},
		"of a serial": {func(p *capb.SharedRevocation) {
			p.Revocation.Subject, p.Revocation.Realm, p.Revocation.BeforeRevision = &capb.Revocation_Serial{Serial: "abc"}, 0, 0
		}, 1, false},
		"of an authority":  {func(p *capb.SharedRevocation) { p.Revocation.Subject = &capb.Revocation_AuthorityId{AuthorityId: "ab"} }, 1, false},
		"over already":     {func(p *capb.SharedRevocation) { p.Revocation.ExpiresAt = timestamppb.Now() }, 0, false},
		"of another realm": {func(p *capb.SharedRevocation) { p.Revocation.Realm = 0 }, 0, true},
		"without a limit":  {func(p *capb.SharedRevocation) { p.Revocation.BeforeRevision = 0 }, 0, true},
		"by a clock ahead": {func(p *capb.SharedRevocation) {
			p.Revocation.ExpiresAt = timestamppb.New(time.Now().Add(48 * time.Hour))
		}, 2, false},
		"with a long note":   {func(p *capb.SharedRevocation) { p.Revocation.Note = strings.Repeat("x", maxNoteBytes+1) }, 2, false},
		"with a broken note": {func(p *capb.SharedRevocation) { p.Revocation.Note = "a\nb" }, 2, false},
		"without a subject":  {func(p *capb.SharedRevocation) { p.Revocation.Subject = nil }, 0, true},
		"with another key":   {func(p *capb.SharedRevocation) { p.Id = "x/../trust" }, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := newRootHolder(t)
			eu := s.below(t, "eu")
			for range 2 { // the second time it is there
				err := s.takeOver(as(t, eu), eu, revoked(test.edit))
				if got := status.Code(err) == codes.InvalidArgument; got != test.refused || !got && err != nil {
					t.Errorf("take over: %v; want it refused: %t", err, test.refused)
				}
			}
			if err := s.wait(t); err != nil {
				t.Fatal(err)
			}
			records := s.registry.Revocations(time.Now())
			if len(records) != test.records {
				t.Errorf("%d records; want %d", len(records), test.records)
			}
			for _, r := range records {
				if r.ExpiresAt.After(time.Now().Add(recordLife)) {
					t.Errorf("a record lives until %s, longer than any SVID", r.ExpiresAt)
				}
				if err := checkNote(r.Note); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// One record that cannot be taken holds up neither the others nor the stream.
func TestRevocationThatCannotBeTakenIsLeftOut(t *testing.T) {
	dir := t.TempDir()
	s, _ := newRootHolderIn(t, dir)
	eu := s.below(t, "eu")
	err := s.hear(as(t, eu), eu, &capb.FollowRequest{TrustBundleSequence: 8, Revocations: []*capb.SharedRevocation{
		revoked(func(p *capb.SharedRevocation) { p.Revocation.Realm = 2 }),
		revoked(func(p *capb.SharedRevocation) { p.Id = strings.Repeat("1", 32) }),
	}})
	if err != nil {
		t.Fatalf("hear: %v; want the rest taken", err)
	}
	if err := s.wait(t); err != nil {
		t.Fatal(err)
	}
	if s.registry.HoldsRevocation(revocation.Prefix+someID) || !s.registry.HoldsRevocation(revocation.Prefix+strings.Repeat("1", 32)) {
		t.Errorf("records = %v; want the good one alone", s.registry.Revocations(time.Now()))
	}
	if p := s.registry.Progress("eu"); p == nil || p.TrustSequence != 8 {
		t.Errorf("progress = %+v; want what it said", p)
	}
	log, err := os.ReadFile(filepath.Join(dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(log), "take over a revocation of nested CA eu"); n != 1 || !strings.Contains(string(log), "which is realm 1") {
		t.Errorf("%d refusals on record; want 1, with the reason", n)
	}
}

func FuzzFitNote(f *testing.F) {
	f.Add(strings.Repeat("é", maxNoteBytes))
	f.Add("a\nb\xff")
	f.Fuzz(func(t *testing.T, text string) {
		got := fitNote(text)
		if err := checkNote(got); err != nil {
			t.Errorf("fitNote(%q) = %q: %v", text, got, err)
		}
		if checkNote(text) == nil && utf8.ValidString(text) && got != text {
			t.Errorf("fitNote(%q) = %q, which was good", text, got)
		}
	})
}

// wait returns once the picture has everything that is stored.
func (s *Service) wait(t *testing.T) error {
	t.Helper()
	revision, err := s.opts.Store.Revision(t.Context())
	if err != nil {
		return err
	}
	return s.registry.Wait(t.Context(), revision)
}

func TestWhoIsBehindBelowIsNamed(t *testing.T) {
	s, _ := newRootHolder(t)
	eu := s.below(t, "eu")
	waits := func() []string {
		if err := s.wait(t); err != nil {
			t.Fatal(err)
		}
		_, view := s.registry.Rotation(time.Now(), registry.Viewer{X509SVID: time.Hour, JWTSVID: time.Minute})
		_, behind := view.Served(9, time.Now())
		return slices.DeleteFunc(behind, func(name string) bool { return name == td.IDString()+"/agent/n1" }) // the harness's
	}
	if got := waits(); !slices.Equal(got, []string{"nested CA eu"}) {
		t.Errorf("before it has said anything: waits for %v; want nested CA eu", got)
	}
	agent := td.IDString() + "/agent/n7"
	if err := s.hear(as(t, eu), eu, &capb.FollowRequest{TrustBundleSequence: 8, Behind: []string{agent}}); err != nil {
		t.Fatal(err)
	}
	if got := waits(); !slices.Equal(got, []string{agent + " below nested CA eu"}) {
		t.Errorf("waits for %v; want the agent below it", got)
	}
	for name, req := range map[string]*capb.FollowRequest{
		"no name of ours":     {Behind: []string{"spiffe://other.test/agent/n7"}},
		"too many":            {Behind: slices.Repeat([]string{agent}, maxBehind+1)},
		"too many at a time":  {Revocations: slices.Repeat([]*capb.SharedRevocation{revoked(func(*capb.SharedRevocation) {})}, maxShared+1)},
		"something else":      {Behind: []string{"agent n7"}},
		"the trust domain":    {Behind: []string{td.IDString()}},
		"a name that is long": {Behind: []string{td.IDString() + "/" + strings.Repeat("x", 3000)}},
	} {
		if err := s.toStatus(t.Context(), s.hear(as(t, eu), eu, req)); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v; want INVALID_ARGUMENT", name, err)
		}
	}
	if err := s.hear(as(t, eu), eu, &capb.FollowRequest{TrustBundleSequence: 9}); err != nil {
		t.Fatal(err)
	}
	if got := waits(); len(got) != 0 {
		t.Errorf("waits for %v; want nobody", got)
	}
	// What cannot be read holds back.
	if _, err := s.opts.Store.Txn(t.Context(), nil, []store.Op{store.Put(replica.ProgressPrefix+"eu", []byte("{}"))}, nil); err != nil {
		t.Fatal(err)
	}
	if got := waits(); !slices.Equal(got, []string{"nested CA eu"}) {
		t.Errorf("with a damaged record: waits for %v; want nested CA eu", got)
	}
	if _, err := s.EvictReplica(as(t, admin()), &capb.EvictReplicaRequest{Name: "eu"}); err != nil {
		t.Fatal(err)
	}
	if got := waits(); len(got) != 0 {
		t.Errorf("waits for %v, which was evicted", got)
	}
	if err := s.hear(as(t, eu), eu, &capb.FollowRequest{TrustBundleSequence: 1}); !WasEvicted(err) {
		t.Errorf("one that was evicted is heard: %v", err)
	}
}

// steps takes what Step asks for, in the place of the CA's own machinery.
type steps struct {
	Authorities
	name string
	took []rotation.Command
}

func (s *steps) TakeFor(_ context.Context, name string, c rotation.Command) (uint64, error) {
	s.name, s.took = name, append(s.took, c)
	return 0, nil
}

func TestStepsAreTakenInTheNameOfTheCaller(t *testing.T) {
	s, _ := newRootHolder(t)
	eu := s.below(t, "eu")
	took := &steps{}
	s.opts.Authorities = took
	csr := newJoiner(t).keys(t).GetJwtCsr()
	resp, err := s.Step(as(t, eu), &capb.StepRequest{Verb: "prepare", JwtCsr: csr, AuthorityId: "of its own choice"})
	if err != nil {
		t.Fatal(err)
	}
	if made := took.took[0].New; took.name != "eu" || made.Replica != "eu" || made.Kind != rotation.JWT || made.ID == "of its own choice" || took.took[0].ID != made.ID {
		t.Errorf("took %+v for %s; want a JWT key of eu under its own ID", took.took[0], took.name)
	}
	if b, err := trust.Decode(store.KV{Key: trust.Key, Value: resp.GetState().GetTrustBundle()}); err != nil || b.Sequence != s.registry.Trust().Sequence {
		t.Errorf("the answer holds %+v, %v; want the trust bundle", b, err)
	}
	for name, req := range map[string]*capb.StepRequest{
		"no key":          {Verb: "prepare"},
		"a long ID":       {Verb: "activate", AuthorityId: strings.Repeat("a", maxAuthorityBytes+1)},
		"a verb too long": {Verb: strings.Repeat("a", maxAuthorityBytes+1)},
	} {
		if _, err := s.Step(as(t, eu), req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v; want INVALID_ARGUMENT", name, err)
		}
	}
	if len(took.took) != 1 {
		t.Errorf("%d steps were taken; want 1", len(took.took))
	}
}

// Whatever bytes come as a revocation, what is taken is told on as it was heard.
func FuzzSharedRevocation(f *testing.F) {
	good, err := proto.Marshal(revoked(func(*capb.SharedRevocation) {}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, b []byte) {
		var p capb.SharedRevocation
		if proto.Unmarshal(b, &p) != nil {
			return
		}
		shared, err := SharedFromProto(&p)
		if err != nil {
			return
		}
		_, ops, err := revocation.Import(shared, 1, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		rec, err := revocation.Decode(store.KV{Key: ops[0].Key, Value: ops[0].Value, ModRevision: 3})
		if err != nil {
			t.Fatalf("%+v was taken, and what is stored of it cannot be read: %v", shared, err)
		}
		if got := rec.Share(); !got.ExpiresAt.Equal(shared.ExpiresAt) || got.ID != shared.ID || got.Serial != shared.Serial || got.SPIFFEID != shared.SPIFFEID ||
			shared.Serial == "" && (got.BeforeRevision != shared.BeforeRevision || got.Realm != shared.Realm) {
			t.Errorf("told on as %+v; heard as %+v", got, shared)
		}
	})
}

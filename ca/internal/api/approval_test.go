// Who counts as whom, what waits, and that an act which does not say is nobody's.

package api

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/approval"
	"merlon.dev/ca/internal/oidc"
	"merlon.dev/ca/internal/role"
)

// Somebody adds an act and does not think of whether it takes two.
func TestActThatDoesNotSayHowManyItTakesIsOpenToNobody(t *testing.T) {
	r := rule{callers: []capb.Caller{capb.Caller_CALLER_ADMIN}, roles: []role.Name{role.Operator}, act: "paint"}
	for approved, want := range map[capb.Approval]bool{
		capb.Approval_APPROVAL_UNSPECIFIED: false, capb.Approval_APPROVAL_NONE: true,
		capb.Approval_APPROVAL_ALWAYS: true, capb.Approval_APPROVAL_BY_REQUEST: true,
	} {
		r.approval = approved
		if _, got := (access{"/x/Y": r}).permits("/x/Y", everybody()); got != want {
			t.Errorf("%s: open to an operator: %v; want %v", approved, got, want)
		}
	}
}

// Root and the CA's own user could read the same keys, so they are one.
func TestPersonOfHostIsOne(t *testing.T) {
	uid := func(n uint32) *Caller { return &Caller{Name: "uid", UID: &n} }
	principal := func(c *Caller) string {
		p, err := personOf(c)
		if err != nil {
			t.Fatal(err)
		}
		return p.Principal
	}
	if root, own := principal(uid(0)), principal(uid(uint32(os.Geteuid()))); root != own || root != theHost {
		t.Errorf("root is %q, and the CA's own user %q; want one", root, own)
	}
	if other := principal(uid(4100)); other == theHost {
		t.Error("another user is the host")
	}
	if got := principal(&Caller{Name: "https://login.test#ann", Token: &oidc.Identity{}}); got != "https://login.test#ann" {
		t.Errorf("the holder of a token is %q", got)
	}
	if _, err := personOf(Anonymous()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("anonymous: %v; want that nobody knows who", err)
	}
}

// Only what can wait is granted, by who holds a role for the whole trust domain.
func TestMayWaitIsForWhatWaits(t *testing.T) {
	s := &Service{access: accessTable()}
	as := func(r role.Role) *Caller {
		c := &Caller{}
		c.take(r)
		return c
	}
	operator, registrar := role.Role{Name: role.Operator}, role.Role{Name: role.Registrar, Prefix: "/ns/shop"}
	for _, c := range []struct {
		method string
		role   role.Role
		want   bool
	}{
		{capb.Admin_TaintAuthority_FullMethodName, operator, true},
		{capb.Admin_CreateEntry_FullMethodName, operator, true},
		{capb.Admin_CreateEntry_FullMethodName, registrar, false},
		{capb.Admin_Revoke_FullMethodName, registrar, false},
		{capb.Admin_TaintAuthority_FullMethodName, role.Role{Name: role.Viewer}, false},
		{capb.Admin_BanAgent_FullMethodName, operator, false},
		{capb.Admin_GrantProposal_FullMethodName, operator, false},
		{"/merlon.ca.v1.Admin/Unheard", operator, false},
	} {
		if _, ok := s.mayWait(as(c.role), c.method); ok != c.want {
			t.Errorf("%s by %s: %v; want %v", c.method, c.role, ok, c.want)
		}
	}
}

// The door of GrantProposal lets in nobody else; the second look is at the act.
func TestMayGrantIsForThoseWhoMayDoIt(t *testing.T) {
	s := &Service{access: accessTable()}
	p, err := approval.New(approval.Terms{Method: capb.Admin_TaintAuthority_FullMethodName, By: approval.Person{Principal: "ann"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[role.Name]codes.Code{role.Operator: codes.OK, role.Viewer: codes.PermissionDenied, role.Registrar: codes.PermissionDenied} {
		c := &Caller{Name: "uid:4100", UID: new(uint32(4100))}
		c.take(role.Role{Name: name})
		if _, err := s.mayGrant(c, p); status.Code(err) != want {
			t.Errorf("%s: %v; want %s", name, err, want)
		}
	}
}

// A replica does what it is configured to, also where it could not write so down.
func TestWaitsAsConfiguredWhateverTheStoreSays(t *testing.T) {
	d, _ := newDoor(t)
	for _, on := range []bool{false, true} {
		d.opts.FourEyes = on
		if got, err := d.waits(t.Context(), capb.Admin_TaintAuthority_FullMethodName, &capb.TaintAuthorityRequest{}); err != nil || got != on {
			t.Errorf("with four_eyes: %v: waits: %v, %v", on, got, err)
		}
	}
}

// A registrar, and a stream, propose nothing: they are refused.
func TestProposesNothingForThoseWhoMayNot(t *testing.T) {
	d, _ := newDoor(t)
	d.opts.FourEyes = true
	ctx := func(r role.Role) context.Context {
		c := &Caller{Name: "uid:4100", UID: new(uint32(4100)), Using: []role.Role{r}}
		return context.WithValue(t.Context(), callerKey{}, c)
	}
	req := &capb.RevokeRequest{Subject: &capb.RevokeRequest_AuthorityId{AuthorityId: "ab"}}
	err := d.propose(ctx(role.Role{Name: role.Registrar, Prefix: "/ns/shop"}), capb.Admin_Revoke_FullMethodName, "revoke", req)
	if status.Code(err) != codes.PermissionDenied || len(status.Convert(err).Details()) > 0 {
		t.Errorf("a registrar: %v; want PermissionDenied", err)
	}
	err = d.propose(ctx(role.Role{Name: role.Operator}), capb.Admin_BackupStore_FullMethodName, "x", nil)
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a stream: %v; want Unimplemented", err)
	}
	all, err := approval.List(t.Context(), d.opts.Store)
	if err != nil || len(all) != 0 {
		t.Errorf("%d proposals were made (%v)", len(all), err)
	}
}

// What is not proposed is refused with a reason of its own.
func TestWhatIsNotProposedSaysWhy(t *testing.T) {
	d, _ := newDoor(t)
	d.opts.FourEyes = true
	c := &Caller{Name: "uid:4100", UID: new(uint32(4100))}
	c.take(role.Role{Name: role.Operator})
	c.Using = []role.Role{{Name: role.Operator}}
	propose := func(note string) error {
		err := d.propose(context.WithValue(t.Context(), callerKey{}, c), capb.Admin_Revoke_FullMethodName, "revoke",
			&capb.RevokeRequest{Subject: &capb.RevokeRequest_AuthorityId{AuthorityId: "ab"}, Note: note})
		if e, ok := errors.AsType[*approval.RefusedError](err); ok {
			return approvalStatus(e) // as each call's answer
		}
		return err
	}
	why := func(err error) string {
		for _, detail := range status.Convert(err).Details() {
			if info, ok := detail.(*errdetails.ErrorInfo); ok {
				return info.GetReason()
			}
		}
		return ""
	}
	if err := propose(strings.Repeat("x", maxDescription)); status.Code(err) != codes.InvalidArgument || why(err) != "PROPOSAL_TOO_LONG" {
		t.Errorf("too long: %v (%s)", err, why(err))
	}
	for i := range 16 {
		if err := propose(fmt.Sprint("note ", i)); why(err) != "APPROVAL_REQUIRED" {
			t.Fatalf("proposal %d: %v (%s)", i, err, why(err))
		}
	}
	if err := propose("one more"); status.Code(err) != codes.ResourceExhausted || why(err) != "PROPOSALS_TOO_MANY" {
		t.Errorf("one more: %v (%s)", err, why(err))
	}
}

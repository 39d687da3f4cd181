// A registrar and what is not its own (SECURITY.md T45).

package ca_test

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	"merlon.dev/ca/capb"
)

const registrarRole, noRole = capb.Role_ROLE_REGISTRAR, capb.Role_ROLE_UNSPECIFIED

// shopRegistrar is a CA with a registrar of /ns/shop, whose own SPIFFE ID lies
// below it too.
func shopRegistrar(t *testing.T) (*testCA, *testClient) {
	t.Helper()
	c := startCA(t, tempDir(t))
	return c, c.admins(c.agent("n1"), "ns/shop/registrar", registrarRole, "/ns/shop")
}

func TestRegistrarRegistersItsOwn(t *testing.T) {
	c, registrar := shopRegistrar(t)
	for id, want := range map[string]codes.Code{
		"ns/shop":           codes.OK,
		"ns/shop/web":       codes.OK,
		"ns/shop/a/b":       codes.OK,
		"ns/shop-evil":      codes.PermissionDenied,
		"ns/shopweb":        codes.PermissionDenied,
		"ns":                codes.PermissionDenied,
		"ns/bank/web":       codes.PermissionDenied,
		"web":               codes.PermissionDenied,
		"x/ns/shop/web":     codes.PermissionDenied,
		"NS/shop/web":       codes.PermissionDenied,
		"ns/shop/../bank":   codes.InvalidArgument,
		"ns/shop/%2e%2e/x":  codes.InvalidArgument,
		"ns//shop/web":      codes.InvalidArgument,
		"agent/n2":          codes.InvalidArgument, // an agent's ID is nobody's to register
		"ns/shop/registrar": codes.PermissionDenied,
	} {
		if _, err := createWithRole(t, registrar.admin, id, noRole, ""); status.Code(err) != want {
			t.Errorf("create %s: %v; want %s", id, err, want)
		}
	}
	if got := c.entriesOf("ns/shop/registrar"); len(got) != 1 {
		t.Errorf("the registrar has %d entries for its own SPIFFE ID; want the one it was given", len(got))
	}
	// Somebody else's trust domain.
	e := newEntry("n1", "x")
	e.SpiffeId = "spiffe://bank.test/ns/shop/web"
	_, err := registrar.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
	wantCode(t, err, codes.InvalidArgument)
}

// What counts outside of the prefix a registrar cannot give.
func TestRegistrarGivesNothingThatCountsElsewhere(t *testing.T) {
	c, registrar := shopRegistrar(t)
	for name, change := range map[string]func(*capb.Entry){
		"role":           func(e *capb.Entry) { e.Role = capb.Role_ROLE_VIEWER },
		"its own role":   func(e *capb.Entry) { e.Role, e.RolePrefix = registrarRole, "/ns/shop" },
		"admin":          func(e *capb.Entry) { e.Admin = true },
		"DNS name":       func(e *capb.Entry) { e.DnsNames = []string{"bank.internal"} },
		"database login": func(e *capb.Entry) { e.CommonName = "postgres" },
		"federation":     func(e *capb.Entry) { e.FederatesWith = []string{"partner.test"} },
	} {
		e := newEntry("n1", "ns/shop/web")
		change(e)
		_, err := registrar.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
		if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "registrar of /ns/shop") {
			t.Errorf("%s: %v; want PermissionDenied, and the caller's role", name, err)
		}
	}
	if got := c.entriesOf("ns/shop/web"); len(got) != 0 {
		t.Errorf("after refusals there are entries: %v", got)
	}
}

// An ID within the prefix that an operator gave a role is beyond a registrar:
// with an entry of its own for it, it would be an operator.
func TestRegistrarCannotTakeOverARole(t *testing.T) {
	c, registrar := shopRegistrar(t)
	ops, err := createWithRole(t, c.admin, "ns/shop/ops", capb.Role_ROLE_OPERATOR, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = createWithRole(t, registrar.admin, "ns/shop/ops", noRole, "")
	wantCode(t, err, codes.PermissionDenied)
	_, err = registrar.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: ops.GetEntryId()})
	wantCode(t, err, codes.PermissionDenied)
	_, err = registrar.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: ops.GetSpiffeId()}})
	wantCode(t, err, codes.PermissionDenied)
	if got := c.entriesOf("ns/shop/ops"); len(got) != 1 || got[0].GetRole() != capb.Role_ROLE_OPERATOR {
		t.Errorf("entries = %v; want the operator's", got)
	}
}

// What is not its own answers as what is not there.
func TestRegistrarSeesItsOwn(t *testing.T) {
	c, registrar := shopRegistrar(t)
	bank, err := createWithRole(t, c.admin, "ns/bank/web", noRole, "")
	if err != nil {
		t.Fatal(err)
	}
	shop, err := createWithRole(t, registrar.admin, "ns/shop/web", noRole, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	nobody := strings.Repeat("0", 32)
	for name, ask := range map[string]func(id string) error{
		"get": func(id string) error {
			_, err := registrar.admin.GetEntry(ctx, &capb.GetEntryRequest{EntryId: id})
			return err
		},
		"delete": func(id string) error {
			_, err := registrar.admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: id})
			return err
		},
	} {
		theirs, none := status.Convert(ask(bank.GetEntryId())), status.Convert(ask(nobody))
		if theirs.Code() != codes.NotFound || theirs.Message() != none.Message() {
			t.Errorf("%s another's entry: %v; want what an unknown ID gets, %v", name, theirs, none)
		}
	}
	if err := revokeID(t, c, bank.GetSpiffeId()); err != nil {
		t.Fatal(err)
	}
	if _, err := registrar.admin.GetEntry(ctx, &capb.GetEntryRequest{EntryId: shop.GetEntryId()}); err != nil {
		t.Errorf("get its own: %v", err)
	}
	if _, err := registrar.admin.DeleteEntry(ctx, &capb.DeleteEntryRequest{EntryId: shop.GetEntryId()}); err != nil {
		t.Errorf("delete its own: %v", err)
	}
	revocations, err := registrar.admin.ListRevocations(ctx, &capb.ListRevocationsRequest{})
	if err != nil || len(revocations.GetRevocations()) != 1 || revocations.GetRevocations()[0].GetSpiffeId() != shop.GetSpiffeId() {
		t.Errorf("revocations = %v, %v; want its own", revocations, err)
	}
	if got := c.entriesOf("ns/bank/web"); len(got) != 1 {
		t.Error("another's entry is gone")
	}
	last := c.auditRecords()
	if i := slices.IndexFunc(last, func(r map[string]any) bool {
		return r["type"] == "refuse" && r["detail"] == "delete entry" && r["entry_id"] == bank.GetEntryId()
	}); i < 0 || last[i]["role"] != "registrar of /ns/shop" || last[i]["spiffe_id"] != bank.GetSpiffeId() {
		t.Error("the audit log does not say that a registrar of /ns/shop tried to delete another's entry")
	}
}

func TestRegistrarRevokesItsOwn(t *testing.T) {
	c, registrar := shopRegistrar(t)
	for name, test := range map[string]struct {
		req  *capb.RevokeRequest
		want codes.Code
	}{
		"its own":       {&capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: "spiffe://shop.test/ns/shop/web"}}, codes.OK},
		"another's":     {&capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: "spiffe://shop.test/ns/bank/web"}}, codes.PermissionDenied},
		"a near name":   {&capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: "spiffe://shop.test/ns/shop-evil"}}, codes.PermissionDenied},
		"an agent":      {&capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: "spiffe://shop.test/agent/n1"}}, codes.PermissionDenied},
		"agent by name": {&capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: "spiffe://shop.test/agent/n1"}}, codes.PermissionDenied},
		"the CA":        {&capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: "spiffe://shop.test/ca"}}, codes.PermissionDenied},
		"an authority":  {&capb.RevokeRequest{Subject: &capb.RevokeRequest_AuthorityId{AuthorityId: "ab"}}, codes.PermissionDenied},
		"a serial":      {&capb.RevokeRequest{Subject: &capb.RevokeRequest_Serial{Serial: "ab"}}, codes.PermissionDenied},
	} {
		if _, err := registrar.admin.Revoke(t.Context(), test.req); status.Code(err) != test.want {
			t.Errorf("%s: %v; want %s", name, err, test.want)
		}
	}
	all, err := c.admin.ListRevocations(t.Context(), &capb.ListRevocationsRequest{})
	if err != nil || len(all.GetRevocations()) != 1 {
		t.Errorf("revocations = %v, %v; want the one of its own", all, err)
	}
}

// Whatever the IDs: a registrar makes an entry exactly where it lists it, and
// pages of its listing leave nothing out.
func TestRegistrarMakesWhatItLists(t *testing.T) {
	c, registrar := shopRegistrar(t)
	segment := rapid.SampledFrom([]string{"ns", "shop", "shop-evil", "bank", "web"})
	own := make(map[string]bool)
	rapid.Check(t, func(rt *rapid.T) {
		id := strings.Join(rapid.SliceOfN(segment, 1, 4).Draw(rt, "id"), "/")
		_, err := createWithRole(t, registrar.admin, id, noRole, "")
		if within := id == "ns/shop" || strings.HasPrefix(id, "ns/shop/"); within != (err == nil) {
			rt.Fatalf("create %s: %v", id, err)
		} else if within {
			own["spiffe://shop.test/"+id] = true
		} else if _, err := createWithRole(t, c.admin, id, noRole, ""); err != nil {
			rt.Fatal(err)
		}
	})
	listed := make(map[string]bool)
	for token := ""; ; {
		page, err := registrar.admin.ListEntries(t.Context(), &capb.ListEntriesRequest{PageSize: 3, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.GetEntries() {
			if e.GetSpiffeId() != registrar.id {
				listed[e.GetSpiffeId()] = true
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	for id := range own {
		if !listed[id] {
			t.Errorf("%s is not listed", id)
		}
	}
	for id := range listed {
		if !own[id] {
			t.Errorf("%s is listed and not its own", id)
		}
	}
	for _, filter := range []*capb.ListEntriesRequest{{SpiffeId: "spiffe://shop.test/ns/bank"}, {ParentId: "spiffe://shop.test/agent/n1"}} {
		page, err := registrar.admin.ListEntries(t.Context(), filter)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.GetEntries() {
			if !strings.HasPrefix(e.GetSpiffeId(), "spiffe://shop.test/ns/shop") {
				t.Errorf("filter %v shows %s", filter, e.GetSpiffeId())
			}
		}
	}
}

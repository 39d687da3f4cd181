// Roles by registration entries: who has one, and until when.

package ca_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/ca/capb"
)

// createWithRole asks for an entry as admin does.
func createWithRole(t *testing.T, admin capb.AdminClient, id string, role capb.Role, prefix string) (*capb.Entry, error) {
	t.Helper()
	e := newEntry("n1", id)
	e.Role, e.RolePrefix = role, prefix
	resp, err := admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
	return resp.GetEntry(), err
}

// An entry made by a client that knows no roles is an operator's, and shows as
// one to both.
func TestAdminEntryIsAnOperators(t *testing.T) {
	c := startCA(t, tempDir(t))
	e := newEntry("n1", "console")
	e.Admin = true
	resp, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.GetEntry(); got.GetRole() != capb.Role_ROLE_OPERATOR || !got.GetAdmin() {
		t.Errorf("entry = %v; want an operator's", got)
	}
	for name, change := range map[string]func(*capb.Entry){
		"admin: ":       func(e *capb.Entry) { e.Role = capb.Role_ROLE_VIEWER },
		"role: ":        func(e *capb.Entry) { e.Admin, e.Role = false, 99 },
		"role_prefix: ": func(e *capb.Entry) { e.RolePrefix = "/ns/shop" },
	} {
		e := newEntry("n1", "other")
		e.Admin = true
		change(e)
		_, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: e})
		if st := status.Convert(err); st.Code() != codes.InvalidArgument || !strings.HasPrefix(st.Message(), name) {
			t.Errorf("%v: %v; want InvalidArgument naming %s", e, err, name)
		}
	}
}

// Whoever could add an entry of its own for an operator's SPIFFE ID would be an
// operator.
func TestEntriesOfOneSPIFFEIDAgreeOnItsRole(t *testing.T) {
	c := startCA(t, tempDir(t))
	mustCreate := func(id string, role capb.Role) {
		t.Helper()
		if _, err := createWithRole(t, c.admin, id, role, ""); err != nil {
			t.Fatal(err)
		}
	}
	mustCreate("ops", capb.Role_ROLE_OPERATOR)
	mustCreate("ops", capb.Role_ROLE_OPERATOR) // on a second node, say
	mustCreate("web", capb.Role_ROLE_UNSPECIFIED)
	for id, role := range map[string]capb.Role{"ops": capb.Role_ROLE_UNSPECIFIED, "web": capb.Role_ROLE_VIEWER} {
		_, err := createWithRole(t, c.admin, id, role, "")
		if st := status.Convert(err); st.Code() != codes.InvalidArgument || !strings.HasPrefix(st.Message(), "role: ") {
			t.Errorf("a second entry for %s with %s: %v; want InvalidArgument naming the role", id, role, err)
		}
	}
}

// SECURITY.md T19: what a connection was opened with is judged again at each
// call.
func TestRoleEndsOnItsOpenConnection(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	list := func(who *testClient) error {
		_, err := who.admin.ListAgents(t.Context(), &capb.ListAgentsRequest{})
		return err
	}
	deleted := c.admins(a, "deleted", capb.Role_ROLE_VIEWER, "")
	revoked := c.admins(a, "revoked", capb.Role_ROLE_VIEWER, "")
	short := newEntry("n1", "short")
	short.Role, short.ExpiresAt = capb.Role_ROLE_VIEWER, timestamppb.New(time.Now().Add(3*time.Second))
	created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: short})
	if err != nil {
		t.Fatal(err)
	}
	expiring := c.client(a.svid(created.GetEntry()))
	for _, who := range []*testClient{deleted, revoked, expiring} {
		if err := list(who); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: c.entriesOf("deleted")[0].GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	if err := revokeID(t, c, revoked.id); err != nil {
		t.Fatal(err)
	}
	wantCode(t, list(deleted), codes.Unauthenticated)
	wantCode(t, list(revoked), codes.Unauthenticated)
	time.Sleep(time.Until(short.GetExpiresAt().AsTime()))
	wantCode(t, list(expiring), codes.Unauthenticated)
}

// SECURITY.md T36, T45: the audit log says who did what in which role.
func TestAuditNamesTheRole(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	viewer := c.admins(a, "watch", capb.Role_ROLE_VIEWER, "")
	operator := c.admins(a, "ops", capb.Role_ROLE_OPERATOR, "")
	if _, err := createWithRole(t, viewer.admin, "mine", 0, ""); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("a viewer makes an entry: %v", err)
	}
	if _, err := createWithRole(t, operator.admin, "mine", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := revokeID(t, c, "spiffe://shop.test/gone"); err != nil { // on the socket: break-glass leaves its trace too
		t.Fatal(err)
	}
	records := c.outcomes()
	own := records[len(records)-1]
	records = records[:len(records)-1]
	refused, made := records[len(records)-2], records[len(records)-1]
	if refused["type"] != "refuse" || refused["actor"] != viewer.id || refused["role"] != "viewer" || refused["detail"] != capb.Admin_CreateEntry_FullMethodName {
		t.Errorf("refusal = %v; want the viewer's", refused)
	}
	if made["type"] != "admin" || made["actor"] != operator.id || made["role"] != "operator" || made["spiffe_id"] != "spiffe://shop.test/mine" {
		t.Errorf("act = %v; want the operator's", made)
	}
	if own["type"] != "admin" || own["actor"] != fmt.Sprintf("uid:%d", os.Geteuid()) || own["role"] != "operator" {
		t.Errorf("act on the socket = %v; want that of the own uid as an operator", own)
	}
}

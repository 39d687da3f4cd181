// Who may do what to what: the RPCs that are about somebody's SPIFFE ID, by role and by
// whose it is, over real connections; what comes in pieces; and what comes in batches
// (SECURITY.md T45). TestAccessMatrix says who may call an RPC at all.

package ca_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/oidcprovider"
)

// objects are SPIFFE IDs that have an entry, by whose they are to a registrar of
// /ns/shop.
var objects = []struct {
	whose, id string
	role      capb.Role
}{
	{"its own", "ns/shop/web", noRole},
	{"far below", "ns/shop/a/b/c", noRole},
	{"itself", "ns/shop/registrar", registrarRole},
	{"an operator's, below", "ns/shop/ops", capb.Role_ROLE_OPERATOR},
	{"a name that begins like it", "ns/shop-evil", noRole},
	{"another's", "ns/bank/web", noRole},
	{"nobody's namespace", "web", noRole},
}

// verb does something to an object, or shows it; seen is false where an answer has
// nothing of it.
type verb struct {
	name string
	do   func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (seen bool, err error)
}

var verbs = []verb{
	{"CreateEntry", func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (bool, error) {
		more := proto.CloneOf(e)
		more.Selectors = []*capb.Selector{{Type: "unix", Value: "uid:2000"}}
		_, err := admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: more})
		return true, err
	}},
	{"GetEntry", func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (bool, error) {
		_, err := admin.GetEntry(t.Context(), &capb.GetEntryRequest{EntryId: e.GetEntryId()})
		return true, err
	}},
	{"ListEntries", func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (bool, error) {
		list, err := admin.ListEntries(t.Context(), &capb.ListEntriesRequest{SpiffeId: e.GetSpiffeId()})
		return len(list.GetEntries()) > 0, err
	}},
	{"ListRevocations", func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (bool, error) {
		list, err := admin.ListRevocations(t.Context(), &capb.ListRevocationsRequest{})
		return slices.ContainsFunc(list.GetRevocations(), func(r *capb.Revocation) bool { return r.GetSpiffeId() == e.GetSpiffeId() }), err
	}},
	{"Revoke", func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (bool, error) {
		_, err := admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_SpiffeId{SpiffeId: e.GetSpiffeId()}})
		return true, err
	}},
	{"DeleteEntry", func(t *testing.T, admin capb.AdminClient, e *capb.Entry) (bool, error) {
		_, err := admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: e.GetEntryId()})
		return true, err
	}},
}

// The table is for a reviewer, like that of TestAccessMatrix: "yes", "not seen", or the
// code of the refusal, after which everything is as it was.
func TestObjectMatrix(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t), withOIDC(t, p))
	a := c.agent("n1")
	token := func(sub string) *testClient { return c.bearer(p.Token(p.Claims("merlon", sub, time.Now()))) }
	callers := []struct {
		name string
		*testClient
	}{
		{"agent", a},
		{"workload /ns/shop/me", c.client(a.svid(c.entry("n1", "ns/shop/me")))},
		{"viewer", c.admins(a, "viewer", capb.Role_ROLE_VIEWER, "")},
		{"registrar of /ns/shop", token("registrar")},
		{"registrar of /ns/bank", c.admins(a, "ns/bank/registrar", registrarRole, "/ns/bank")},
		{"policy-publisher", c.admins(a, "publisher", capb.Role_ROLE_POLICY_PUBLISHER, "")},
		{"operator", token("operator")},
	}
	var out bytes.Buffer
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "RPC\twhose")
	for _, who := range callers {
		fmt.Fprint(table, "\t", who.name)
	}
	fmt.Fprintln(table)
	for _, o := range objects {
		if err := revokeID(t, c, "spiffe://shop.test/"+o.id); err != nil { // so that ListRevocations has one
			t.Fatal(err)
		}
	}
	namesObjects(t)
	for _, verb := range verbs {
		for _, o := range objects {
			fmt.Fprint(table, verb.name, "\t", o.whose)
			for _, who := range callers {
				e := c.object(t, o.id, o.role)
				entries, revocations := c.standing(t, o.id)
				seen, err := verb.do(t, who.admin, e)
				fmt.Fprint(table, "\t", outcome(seen, err))
				if err == nil {
					continue
				}
				if now, revoked := c.standing(t, o.id); now != entries || revoked != revocations {
					t.Errorf("%s of %s by %s is refused (%v), and changes %q to %q, %d to %d", verb.name, o.whose, who.name, err, entries, now, revocations, revoked)
				}
			}
			fmt.Fprintln(table)
		}
	}
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	reviewed(t, "objects.golden", "who may do what to what", out.String())
}

// namesObjects fails where an RPC for administrators is about an entry or a SPIFFE ID and
// is not in the table.
func namesObjects(t *testing.T) {
	t.Helper()
	for _, m := range rpcs() {
		fields := m.Input().Fields()
		about := fields.ByName("entry") != nil || fields.ByName("entry_id") != nil || fields.ByName("spiffe_id") != nil
		if m.Parent().Name() == "Admin" && about && !slices.ContainsFunc(verbs, func(v verb) bool { return v.name == string(m.Name()) }) {
			t.Errorf("%s is about a SPIFFE ID, and not in the table", m.Name())
		}
	}
}

func outcome(seen bool, err error) string {
	switch {
	case err != nil:
		return status.Code(err).String()
	case !seen:
		return "not seen"
	}
	return "yes"
}

// object is the entry of a SPIFFE ID, made where there is none.
func (c *testCA) object(t *testing.T, id string, role capb.Role) *capb.Entry {
	t.Helper()
	if held := c.entriesOf(id); len(held) > 0 {
		return held[0]
	}
	prefix := ""
	if role == registrarRole {
		prefix = "/ns/shop"
	}
	e, err := createWithRole(t, c.admin, id, role, prefix)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// standing is what there is of a SPIFFE ID: its entries, and how many revocations.
func (c *testCA) standing(t *testing.T, id string) (entries string, revocations int) {
	t.Helper()
	for _, e := range c.entriesOf(id) {
		entries += fmt.Sprintf("%s@%d ", e.GetEntryId(), e.GetRevision())
	}
	list, err := c.admin.ListRevocations(t.Context(), &capb.ListRevocationsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list.GetRevocations() {
		if r.GetSpiffeId() == "spiffe://shop.test/"+id {
			revocations++
		}
	}
	return entries, revocations
}

// rawCodec sends a message as it is.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) {
	if raw, ok := v.([]byte); ok {
		return raw, nil
	}
	return proto.Marshal(v.(proto.Message))
}

func (rawCodec) Unmarshal(data []byte, v any) error { return proto.Unmarshal(data, v.(proto.Message)) }

var _ encoding.Codec = rawCodec{}

// There are no updates, and so no masks of them. What a request can do in their place is
// to come in pieces, which a decoder puts together: of an entry that is said twice, fields
// that nobody reads, and a field that only the first piece has. What counts is judged.
func TestPiecesOfARequestAreJudgedAsOne(t *testing.T) {
	c, registrar := shopRegistrar(t)
	piece := func(e *capb.Entry) []byte {
		text, err := proto.Marshal(&capb.CreateEntryRequest{Entry: e})
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	shop, bank := newEntry("n1", "ns/shop/web"), newEntry("n1", "ns/bank/web")
	bank.Selectors = nil // lists are joined
	mask := protowire.AppendString(protowire.AppendTag(nil, 2, protowire.BytesType), "spiffe_id,role")
	for name, test := range map[string]struct {
		pieces [][]byte
		want   codes.Code
	}{
		"its own, then another's":       {[][]byte{piece(shop), piece(bank)}, codes.PermissionDenied},
		"another's, then its own":       {[][]byte{piece(bank), piece(shop)}, codes.OK},
		"a role, then its own":          {[][]byte{piece(&capb.Entry{Role: capb.Role_ROLE_OPERATOR}), piece(shop)}, codes.PermissionDenied},
		"its own, then admin":           {[][]byte{piece(shop), piece(&capb.Entry{Admin: true})}, codes.PermissionDenied},
		"a DNS name, then its own":      {[][]byte{piece(&capb.Entry{DnsNames: []string{"bank.internal"}}), piece(shop)}, codes.PermissionDenied},
		"another's with a mask without": {[][]byte{piece(shop), piece(bank), mask}, codes.PermissionDenied},
		"its own with a mask":           {[][]byte{mask, piece(shop)}, codes.OK},
	} {
		var resp capb.CreateEntryResponse
		err := registrar.conn.Invoke(t.Context(), capb.Admin_CreateEntry_FullMethodName, slices.Concat(test.pieces...), &resp, grpc.ForceCodec(rawCodec{}))
		if status.Code(err) != test.want {
			t.Errorf("%s: %v; want %s", name, err, test.want)
		}
		if made := resp.GetEntry(); err == nil && (made.GetSpiffeId() != shop.GetSpiffeId() || made.GetRole() != noRole || made.GetAdmin() || len(made.GetDnsNames()) > 0) {
			t.Errorf("%s: made %v", name, made)
		}
	}
	if got := c.entriesOf("ns/bank/web"); len(got) > 0 {
		t.Errorf("another's entries: %v", got)
	}
}

// Of a batch each item is judged by itself: what is not the caller's is refused, and
// neither keeps the others from being answered nor comes along with them.
func TestEachItemOfABatchIsJudged(t *testing.T) {
	c := startCA(t, tempDir(t))
	a := c.agent("n1")
	web, orders, foreign := c.entry("n1", "web"), c.entry("n1", "orders"), c.entry("n2", "bank")
	ids := []string{web.GetEntryId(), foreign.GetEntryId(), strings.Repeat("0", 32), orders.GetEntryId(), foreign.GetEntryId()}
	want := []codes.Code{codes.OK, codes.PermissionDenied, codes.PermissionDenied, codes.OK, codes.PermissionDenied}
	x509s, jwts := &capb.SignRequest{}, &capb.SignJWTRequest{}
	for _, id := range ids {
		_, csr := newCSR(t)
		x509s.Items = append(x509s.Items, &capb.SignItem{EntryId: id, Csr: csr})
		jwts.Items = append(jwts.Items, &capb.SignJWTItem{EntryId: id, Audience: []string{"x"}})
	}
	before := len(c.issuances())
	signed, err := a.node.Sign(t.Context(), x509s)
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := a.node.SignJWT(t.Context(), jwts)
	if err != nil {
		t.Fatal(err)
	}
	for i := range ids {
		x, j := signed.GetResults()[i], tokens.GetResults()[i]
		if codes.Code(x.GetCode()) != want[i] || len(x.GetX509Svid()) > 0 != (want[i] == codes.OK) {
			t.Errorf("item %d: %s %q, %d certificates; want %s", i, codes.Code(x.GetCode()), x.GetMessage(), len(x.GetX509Svid()), want[i])
		}
		if codes.Code(j.GetCode()) != want[i] || j.GetToken() != "" != (want[i] == codes.OK) {
			t.Errorf("JWT %d: %s %q, token %t; want %s", i, codes.Code(j.GetCode()), j.GetMessage(), j.GetToken() != "", want[i])
		}
	}
	if got := len(c.issuances()) - before; got != 4 {
		t.Errorf("%d issuances are on record; want the 4 of the agent's own entries", got)
	}
}

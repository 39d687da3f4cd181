// Who may call what: every RPC of every service that the protos declare, by
// every kind of caller, over real connections (SECURITY.md T8, T45).

package ca_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/authority"
	"merlon.dev/integration/oidcprovider"
	"merlon.dev/sdk/svid"
	"merlon.dev/sdk/svid/forge"
	"merlon.dev/sdk/unixsock"
)

// callers makes a connection for each kind of caller, in the order of the
// matrix.
func callers(t *testing.T, c *testCA, p *oidcprovider.Provider) []caller {
	token := func(sub string) *grpc.ClientConn {
		return c.bearer(p.Token(p.Claims("merlon", sub, time.Now()))).conn
	}
	a := c.agent("n1")
	revoked := c.agent("revoked")
	if _, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: revoked.id}}); err != nil {
		t.Fatal(err)
	}
	evicted, banned := c.agent("evicted"), c.agent("banned")
	if _, err := c.admin.EvictAgent(t.Context(), &capb.EvictAgentRequest{Agent: evicted.id}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.BanAgent(t.Context(), &capb.BanAgentRequest{Agent: banned.id}); err != nil {
		t.Fatal(err)
	}
	former := c.admins(a, "former", capb.Role_ROLE_OPERATOR, "")
	for _, e := range c.entriesOf("former") {
		if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: e.GetEntryId()}); err != nil {
			t.Fatal(err)
		}
	}
	partner := forge.New(t, "partner.test")
	if _, err := c.federate(partner, 1, false); err != nil {
		t.Fatal(err)
	}
	outside := func(a *forge.Authority) *grpc.ClientConn {
		leaf := a.Leaf("/agent/n1")
		return c.client(leaf.Key.(*ecdsa.PrivateKey), leaf.Raw()).conn
	}
	socket, err := grpc.NewClient("unix://"+c.srv.AdminSocket(), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	return []caller{
		{"anonymous", c.client(nil, nil).conn},
		{"agent", a.conn},
		{"revoked agent", revoked.conn},
		{"evicted agent", evicted.conn},
		{"banned agent", banned.conn},
		{"workload", c.client(a.svid(c.entry("n1", "web"))).conn},
		{"viewer", c.admins(a, "viewer", capb.Role_ROLE_VIEWER, "").conn},
		{"registrar", c.admins(a, "registrar", capb.Role_ROLE_REGISTRAR, "/ns/shop").conn},
		{"policy-publisher", c.admins(a, "publisher", capb.Role_ROLE_POLICY_PUBLISHER, "").conn},
		{"operator", c.admins(a, "operator", capb.Role_ROLE_OPERATOR, "").conn},
		{"former operator", former.conn},
		{"own uid on socket", socket},
		{"viewer's token", token("viewer")},
		{"registrar's token", token("registrar")},
		{"policy-publisher's token", token("policy-publisher")},
		{"operator's token", token("operator")},
		{"token without role", token("stranger")},
		{"bad token", c.bearer("a.b.c").conn},
		{"replica", c.stolen(capb.TokenKind_TOKEN_KIND_REPLICA, 0).conn},
		{"nested CA", c.stolen(capb.TokenKind_TOKEN_KIND_NESTED_CA, 1).conn},
		{"federated agent", outside(partner)},
		{"stranger's agent", outside(forge.New(t, "shop.test"))},
	}
}

// stolen is whoever has the keys of a CA that joined c, and makes X509-SVIDs of c's
// replicas with them.
func (c *testCA) stolen(kind capb.TokenKind, realm uint32) *testClient {
	c.t.Helper()
	token, err := c.admin.CreateToken(c.t.Context(), &capb.CreateTokenRequest{Kind: kind, ReplicaName: "stolen" + strconv.Itoa(int(kind))})
	if err != nil {
		c.t.Fatal(err)
	}
	key, intermediate := newCSR(c.t)
	_, policy := newCSR(c.t)
	_, jwt := newCSR(c.t)
	joined, err := capb.NewReplicaClient(c.client(nil, nil).conn).Join(c.t.Context(), &capb.ReplicaJoinRequest{
		Token: token.GetToken(), OwnStore: kind == capb.TokenKind_TOKEN_KIND_NESTED_CA,
		Keys: &capb.ReplicaKeys{IntermediateCsr: intermediate, PolicyCsr: policy, JwtCsr: jwt},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	chain, err := x509.ParseCertificates(slices.Concat(joined.GetCertificates().GetIntermediate()...))
	if err != nil {
		c.t.Fatal(err)
	}
	root, err := x509.ParseCertificate(joined.GetCertificates().GetRoot())
	if err != nil {
		c.t.Fatal(err)
	}
	serial, err := svid.NewSerial(0, 1)
	if err != nil {
		c.t.Fatal(err)
	}
	own, _ := newCSR(c.t)
	x509CA := authority.X509Authority{Chain: chain, Root: root, Signer: key}
	leaf, err := x509CA.Issue(authority.LeafRequest{
		SPIFFEID: spiffeid.RequireFromString("spiffe://shop.test/ca"), PublicKey: own.Public(), Serial: serial.In(realm), TTL: time.Hour, Now: time.Now(),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return c.client(own, append([][]byte{leaf.DER}, joined.GetCertificates().GetIntermediate()...))
}

type caller struct {
	name string
	conn *grpc.ClientConn
}

// The matrix is made from the descriptors, so that a new RPC appears in it, and
// compared with a table that a reviewer reads: "yes" where the call was let
// through to the RPC, "-" where it was refused, "n/a" where it is not served. Who is
// refused at the handshake is refused everywhere.
func TestAccessMatrix(t *testing.T) {
	p := oidcprovider.Start(t)
	c := startCA(t, tempDir(t), withOIDC(t, p))
	who := callers(t, c, p)
	var out bytes.Buffer
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "RPC")
	for _, w := range who {
		fmt.Fprint(table, "\t", w.name)
	}
	fmt.Fprintln(table)
	for _, m := range rpcs() {
		fmt.Fprint(table, m.Parent().Name(), ".", m.Name())
		for _, w := range who {
			err := call(t, w.conn, fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()), m.IsStreamingClient())
			fmt.Fprint(table, "\t", verdict(err))
		}
		fmt.Fprintln(table)
	}
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	reviewed(t, "access.golden", "who may call what", out.String())
}

// reviewed compares a table with the one in testdata that was reviewed.
func reviewed(t *testing.T, file, what, got string) {
	t.Helper()
	golden := filepath.Join("testdata", file)
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s has changed; if that is meant, go test ./ca -run %s -update, and let the table be reviewed (-want +got):\n%s", what, t.Name(), diff)
	}
}

// rpcs are those of all services of the CA, in order of their names.
func rpcs() []protoreflect.MethodDescriptor {
	var all []protoreflect.MethodDescriptor
	protoregistry.GlobalFiles.RangeFilesByPackage("merlon.ca.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			methods := f.Services().Get(i).Methods()
			for j := range methods.Len() {
				all = append(all, methods.Get(j))
			}
		}
		return true
	})
	slices.SortFunc(all, func(a, b protoreflect.MethodDescriptor) int {
		return strings.Compare(string(a.FullName()), string(b.FullName()))
	})
	return all
}

func verdict(err error) string {
	switch {
	case isDenial(err), isUntrusted(err):
		return "-"
	case status.Code(err) == codes.Unimplemented:
		return "n/a"
	default:
		return "yes"
	}
}

// isUntrusted tells a connection that the CA ended at its handshake, which the client
// hears of in several ways, from an RPC that is Unavailable.
func isUntrusted(err error) bool {
	if status.Code(err) != codes.Unavailable {
		return false
	}
	for _, how := range []string{"bad certificate", "connection reset", "broken pipe", "error reading"} {
		if strings.Contains(err.Error(), how) {
			return true
		}
	}
	return false
}

// isDenial tells the access table's refusals from those of the RPC itself.
func isDenial(err error) bool {
	st := status.Convert(err)
	return st.Code() == codes.Unauthenticated ||
		st.Code() == codes.PermissionDenied && (strings.Contains(st.Message(), "may not call") || strings.Contains(st.Message(), "open to nobody"))
}

// call sends an empty request.
func call(t *testing.T, conn *grpc.ClientConn, method string, streaming bool) error {
	t.Helper()
	if !streaming {
		return conn.Invoke(t.Context(), method, &emptypb.Empty{}, &emptypb.Empty{})
	}
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	// io.EOF: the call has ended already, and RecvMsg says how.
	if err := stream.SendMsg(&emptypb.Empty{}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var reply emptypb.Empty
	return stream.RecvMsg(&reply)
}

// A service on the admin socket that is not ours is for administrators, and an
// RPC that nobody annotated is for nobody.
func TestExtraServicesAreForAdministrators(t *testing.T) {
	desc := grpc.ServiceDesc{
		ServiceName: "test.Extra", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Do", Handler: func(_ any, ctx context.Context, dec func(any) error, icpt grpc.UnaryServerInterceptor) (any, error) {
			var in emptypb.Empty
			if err := dec(&in); err != nil {
				return nil, err
			}
			return icpt(ctx, &in, &grpc.UnaryServerInfo{FullMethod: "/test.Extra/Do"}, func(context.Context, any) (any, error) { return &emptypb.Empty{}, nil })
		}}},
	}
	c := startCA(t, tempDir(t), withAdminService(func(r grpc.ServiceRegistrar) { r.RegisterService(&desc, nil) }))
	socket, err := grpc.NewClient("unix://"+c.srv.AdminSocket(), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := call(t, socket, "/test.Extra/Do", false); err != nil {
		t.Errorf("administrator on the socket: %v", err)
	}
	err = call(t, c.client(nil, nil).conn, "/test.Extra/Do", false)
	wantCode(t, err, codes.Unimplemented)
	if err := call(t, socket, "/grpc.health.v1.Health/Check", false); err != nil {
		t.Errorf("health on the socket: %v", err)
	}
}

// The TLS port offers neither reflection nor health (SECURITY.md T47).
func TestTLSPortServesNothingElse(t *testing.T) {
	c := startCA(t, tempDir(t))
	conn := c.client(nil, nil).conn
	for _, method := range []string{"/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"} {
		err := call(t, conn, method, false)
		wantCode(t, err, codes.Unimplemented)
	}
}

// An SVID counts until its end, also on a connection that is still open.
func TestExpiredAgentIsRefusedOnItsOpenConnection(t *testing.T) {
	c := startCA(t, tempDir(t), withAgentTTL(2*time.Second))
	a := c.agent("n1")
	stream := a.sync(0)
	until(t, stream, synced)
	for {
		if _, err := stream.Recv(); err != nil {
			wantCode(t, err, codes.Unauthenticated)
			break
		}
	}
	_, csr := newCSR(t)
	_, err := a.node.Renew(t.Context(), &capb.RenewRequest{Csr: csr})
	wantCode(t, err, codes.Unauthenticated)
	if !strings.Contains(status.Convert(err).Message(), "expired") {
		t.Errorf("error = %v; want it to say that the SVID has expired", err)
	}
}

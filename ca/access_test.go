// Who may call what: every RPC of every service that the protos declare, by
// every kind of caller, over real connections (SECURITY.md T8, T45).

package ca_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	"merlon.dev/ca/capb"
	"merlon.dev/sdk/unixsock"
)

// callers makes a connection for each kind of caller, and says which kinds of
// the protos it is.
func callers(t *testing.T, c *testCA) map[string]caller {
	a := c.agent("n1")
	workload := c.entry("n1", "web")
	adminEntry := newEntry("n1", "console")
	adminEntry.Admin = true
	created, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: adminEntry})
	if err != nil {
		t.Fatal(err)
	}
	exAdmin := newEntry("n1", "ex-console")
	exAdmin.Admin = true
	former, err := c.admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: exAdmin})
	if err != nil {
		t.Fatal(err)
	}
	workloadKey, workloadChain := a.svid(workload)
	adminKey, adminChain := a.svid(created.GetEntry())
	formerKey, formerChain := a.svid(former.GetEntry())
	if _, err := c.admin.DeleteEntry(t.Context(), &capb.DeleteEntryRequest{EntryId: former.GetEntry().GetEntryId()}); err != nil {
		t.Fatal(err)
	}
	revoked := c.agent("revoked")
	if _, err := c.admin.Revoke(t.Context(), &capb.RevokeRequest{Subject: &capb.RevokeRequest_AgentId{AgentId: revoked.id}}); err != nil {
		t.Fatal(err)
	}
	socket, err := grpc.NewClient("unix://"+c.srv.AdminSocket(), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	anyone := capb.Caller_CALLER_ANONYMOUS
	return map[string]caller{
		"anonymous":     {c.client(nil, nil).conn, []capb.Caller{anyone}},
		"agent":         {a.conn, []capb.Caller{anyone, capb.Caller_CALLER_AGENT}},
		"revoked agent": {revoked.conn, []capb.Caller{anyone}},
		"workload":      {c.client(workloadKey, workloadChain).conn, []capb.Caller{anyone}},
		"admin SVID":    {c.client(adminKey, adminChain).conn, []capb.Caller{anyone, capb.Caller_CALLER_ADMIN}},
		"former admin":  {c.client(formerKey, formerChain).conn, []capb.Caller{anyone}},
		"admin socket":  {socket, []capb.Caller{anyone, capb.Caller_CALLER_ADMIN}},
	}
}

type caller struct {
	conn  *grpc.ClientConn
	kinds []capb.Caller
}

func (c caller) in(kinds []capb.Caller) bool {
	return slices.ContainsFunc(c.kinds, func(have capb.Caller) bool { return slices.Contains(kinds, have) })
}

func TestAccessMatrix(t *testing.T) {
	c := startCA(t, tempDir(t))
	for name, who := range callers(t, c) {
		for _, file := range []protoreflect.FileDescriptor{capb.File_ca_capb_node_proto, capb.File_ca_capb_admin_proto} {
			for i := range file.Services().Len() {
				svc := file.Services().Get(i)
				if name == "admin socket" && svc.Name() != "Admin" {
					continue // the socket serves Admin alone
				}
				for j := range svc.Methods().Len() {
					m := svc.Methods().Get(j)
					method := fmt.Sprintf("/%s/%s", svc.FullName(), m.Name())
					access := proto.GetExtension(m.Options(), capb.E_Access).(*capb.Access)
					err := call(t, who.conn, method, m.IsStreamingClient())
					denied := isDenial(err)
					if want := !who.in(access.GetCallers()); denied != want {
						t.Errorf("%s by %s: error %v, denied = %v; want %v", method, name, err, denied, want)
					}
				}
			}
		}
	}
}

// isDenial tells the access table's refusals from those of the RPC itself.
func isDenial(err error) bool {
	st := status.Convert(err)
	return st.Code() == codes.Unauthenticated ||
		st.Code() == codes.PermissionDenied && strings.Contains(st.Message(), "may not call")
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
	if err := stream.SendMsg(&emptypb.Empty{}); err != nil {
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

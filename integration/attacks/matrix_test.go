// T8: who may call what at the agent's two sockets: every RPC that the protos declare or
// that a socket says it serves, by every kind of caller. The CA's is TestAccessMatrix.

package attacks_test

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	_ "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"   // its services
	_ "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3" // its services
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/health/grpc_health_v1" // its services
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/emptypb"

	_ "merlon.dev/agent/agentpb" // its services
	_ "merlon.dev/ca/capb"       // its services
	"merlon.dev/integration/stage"
)

var update = flag.Bool("update", false, "rewrite golden files")

// packages are those whose services could be at the agent.
var packages = []protoreflect.FullName{
	"merlon.agent.v1", "merlon.ca.v1", "", "envoy.service.auth.v3", "envoy.service.secret.v3", "grpc.health.v1", "grpc.reflection.v1",
}

// rpcs are their methods by path.
func rpcs() map[string]protoreflect.MethodDescriptor {
	all := map[string]protoreflect.MethodDescriptor{}
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if !slices.Contains(packages, f.Package()) {
			return true
		}
		for i := range f.Services().Len() {
			methods := f.Services().Get(i).Methods()
			for j := range methods.Len() {
				all[fmt.Sprintf("/%s/%s", methods.Get(j).Parent().FullName(), methods.Get(j).Name())] = methods.Get(j)
			}
		}
		return true
	})
	return all
}

// Golden, like the CA's: "yes" where the call came to the RPC, "no entry" where it did
// and nothing is registered for the caller, "header" where it was refused for want of
// the security header, "-" where it was refused, "n/a" where it is not served.
func TestWhoMayCallWhatOfTheAgent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	d := stage.Separate(t)
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/me"), "--parent", d.AgentID(), "--selector", "unix:uid:0")
	public := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	openTo(t, public)
	openTo(t, d.AgentAdmin) // who is let in is then for the agent to say
	stage.Eventually(t, "the agent serves", func() error { return os.Chmod(d.AgentAdmin, 0o666) })
	dial := func(path string) *grpc.ClientConn {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		return over(t, conn)
	}
	other := func(path string) *grpc.ClientConn {
		conn, _ := receive(t, stranger, path)
		return over(t, conn)
	}
	stage.Eventually(t, "there is an SVID", func() error {
		_, err := svids(t.Context(), dial(public))
		return err
	})
	callers := []struct {
		name   string
		conn   *grpc.ClientConn
		header bool
	}{
		{"workload", dial(public), true},
		{"workload, no header", dial(public), false},
		{"stranger", other(public), true},
		{"stranger, no header", other(public), false},
		{"admin socket: root", dial(d.AgentAdmin), false},
		{"admin socket: stranger", other(d.AgentAdmin), false},
	}
	methods := rpcs()
	for i, conn := range []*grpc.ClientConn{callers[0].conn, callers[4].conn} {
		for _, service := range reflected(t, conn) {
			if !slices.ContainsFunc(paths(methods), func(m string) bool { return strings.HasPrefix(m, "/"+service+"/") }) && !strings.HasPrefix(service, "grpc.reflection.") {
				t.Errorf("socket %d serves %s, which is not in the table", i, service)
			}
		}
	}
	verdicts := map[string][]string{}
	var wg sync.WaitGroup
	for path, m := range methods {
		row := make([]string, len(callers))
		verdicts[path] = row
		for i, who := range callers {
			wg.Go(func() { row[i] = verdict(call(t.Context(), who.conn, path, m, who.header)) })
		}
	}
	wg.Wait()
	var out bytes.Buffer
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "RPC")
	for _, who := range callers {
		fmt.Fprint(table, "\t", who.name)
	}
	fmt.Fprintln(table)
	for _, path := range paths(methods) {
		fmt.Fprintf(table, "%s\t%s\n", path[1:], strings.Join(verdicts[path], "\t"))
	}
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	golden := filepath.Join("testdata", "agent.golden")
	if *update {
		if err := os.WriteFile(golden, out.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("who may call what has changed; if that is meant, go test ./integration/attacks -run TestWhoMayCall -update, and let the table be reviewed (-want +got):\n%s", diff)
	}
}

func paths(methods map[string]protoreflect.MethodDescriptor) (all []string) {
	for path := range methods {
		all = append(all, path)
	}
	slices.Sort(all)
	return all
}

// reflected are the services that a socket says it has.
func reflected(t *testing.T, conn *grpc.ClientConn) (names []string) {
	t.Helper()
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range m.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	return names
}

// call sends an empty request, and no more, and waits for the first answer or the end.
func call(ctx context.Context, conn *grpc.ClientConn, path string, m protoreflect.MethodDescriptor, header bool) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if header {
		ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	}
	if !m.IsStreamingClient() && !m.IsStreamingServer() {
		return conn.Invoke(ctx, path, &emptypb.Empty{}, &emptypb.Empty{})
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, path)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&emptypb.Empty{}); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(&emptypb.Empty{})
}

func verdict(err error) string {
	st := status.Convert(err)
	reason := ""
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			reason = info.GetReason()
		}
	}
	switch {
	case st.Code() == codes.Unimplemented:
		return "n/a"
	case st.Code() == codes.PermissionDenied && reason == "NO_MATCHING_ENTRY":
		return "no entry"
	case st.Code() == codes.InvalidArgument && strings.Contains(st.Message(), "workload.spiffe.io"):
		return "header"
	case st.Code() == codes.PermissionDenied && reason == "":
		return "-"
	default:
		return "yes"
	}
}

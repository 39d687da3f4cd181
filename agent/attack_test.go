// What a hostile process of the node can do to the public socket, and what a
// lost CA must not make the agent say.

package agent_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/agentpb"
	"merlon.dev/agent/internal/endpoint"
	"merlon.dev/agent/internal/fakeca"
)

func TestAnotherIdentityIsNotDeniedWhileTheCAIsAway(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cc, ctx := conn(t, n.socket)
	other := "spiffe://" + td + "/new" // may have been made since the CA went
	jwt := func() error {
		_, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: other})
		return err
	}
	authorize := func() error {
		_, err := agentpb.NewLocalClient(cc).Authorize(ctx, &agentpb.AuthorizeRequest{Destination: other})
		return err
	}
	wantError(t, jwt(), codes.PermissionDenied, endpoint.NotEntitled)
	wantError(t, authorize(), codes.PermissionDenied, endpoint.NotEntitled)
	ca.Stop()
	eventually(t, "the agent notices", func() bool { return status.Code(jwt()) == codes.Unavailable })
	wantError(t, jwt(), codes.Unavailable, endpoint.NotSynced)
	wantError(t, authorize(), codes.Unavailable, endpoint.NotSynced)
}

// Calls whose request never comes cost a goroutine each, too.
func TestCallsWithoutRequestsCount(t *testing.T) {
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	unary := &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}
	var last []grpc.ClientStream
	for range 2 {
		cc, ctx := conn(t, n.socket)
		for range 600 {
			s, err := cc.NewStream(ctx, unary, workload.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName)
			if err != nil {
				t.Fatal(err)
			}
			last = append(last, s)
		}
	}
	err := last[len(last)-1].RecvMsg(new(workload.JWTSVIDResponse))
	wantError(t, err, codes.ResourceExhausted, endpoint.TooManyStreams)
}

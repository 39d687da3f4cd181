// Shares of what is done for a user.

package endpoint

import (
	"context"
	"os"
	"testing"
	"testing/synctest"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"merlon.dev/agent/agentpb"
	"merlon.dev/sdk/unixsock"
)

func TestRateIsPerUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(10, 3)
		take := func(uid uint32) (n int) {
			for r.Take(uid) {
				n++
			}
			return n
		}
		if got := take(1); got != 3 {
			t.Errorf("a user took %d at once; want 3", got)
		}
		if got := take(2); got != 3 {
			t.Errorf("another user took %d then; want 3: his own", got)
		}
		time.Sleep(200 * time.Millisecond)
		if got := take(1); got != 2 {
			t.Errorf("%d came back in 0.2 s; want 2", got)
		}
		time.Sleep(time.Hour)
		if got := take(1); got != 3 {
			t.Errorf("%d came back in an hour; want 3", got)
		}
	})
}

// Memory does not grow with the users that there ever were.
func TestRateForgetsUsersAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(1, 2)
		for uid := range uint32(10_000) {
			r.Take(uid)
			r.Take(uid)
			if uid%100 == 99 {
				time.Sleep(time.Second)
			}
		}
		// Two hundred are not at rest at any time.
		if len(r.users) > 1000 {
			t.Errorf("%d users are remembered; want some hundred", len(r.users))
		}
	})
}

// Only what a client has to do once is counted: decisions are asked for call by
// call.
func TestStreamsAreOpenedAtARate(t *testing.T) {
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: unixsock.AuthInfo{Peer: &unixsock.Peer{UID: uint32(os.Geteuid())}}})
	open := NewLimit(1000).Tap(NewRate(1, 2))
	for method, want := range map[string]codes.Code{
		workloadpb.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName:    codes.ResourceExhausted,
		workloadpb.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName: codes.ResourceExhausted,
		workloadpb.SpiffeWorkloadAPI_FetchJWTBundles_FullMethodName:  codes.ResourceExhausted,
		secretv3.SecretDiscoveryService_StreamSecrets_FullMethodName: codes.ResourceExhausted,
		secretv3.SecretDiscoveryService_DeltaSecrets_FullMethodName:  codes.ResourceExhausted,
		secretv3.SecretDiscoveryService_FetchSecrets_FullMethodName:  codes.ResourceExhausted,
		agentpb.Local_Watch_FullMethodName:                           codes.ResourceExhausted,
		agentpb.Local_WatchPolicy_FullMethodName:                     codes.ResourceExhausted,
		agentpb.Local_Authorize_FullMethodName:                       codes.OK,
		authv3.Authorization_Check_FullMethodName:                    codes.OK,
	} {
		var last error
		for range 10 {
			called, done := context.WithCancel(ctx)
			_, last = open(called, &tap.Info{FullMethodName: method})
			done()
		}
		if status.Code(last) != want {
			t.Errorf("the tenth %s = %v; want %v", method, last, want)
		}
	}
	if _, err := open(t.Context(), &tap.Info{FullMethodName: workloadpb.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName}); status.Code(err) != codes.Internal {
		t.Errorf("a call of nobody = %v; want Internal", err)
	}
}

// Shares per user.

package endpoint

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"merlon.dev/sdk/unixsock"
)

func TestLimitIsPerUser(t *testing.T) {
	l := NewLimit(2)
	for range 2 {
		if !l.Take(1) {
			t.Fatal("a user did not get his share")
		}
	}
	if l.Take(1) {
		t.Error("a user got more than his share")
	}
	if !l.Take(2) {
		t.Error("a user's share was taken by another")
	}
	l.Give(1)
	if !l.Take(1) {
		t.Error("what was given back cannot be taken")
	}
	for range 2 {
		l.Give(1)
	}
	l.Give(2)
	if len(l.used) != 0 {
		t.Errorf("%d users are remembered; want none", len(l.used))
	}
}

// A call counts from its first header on until it ends.
func TestCallsAreLimitedAndReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		open := NewLimit(1).Tap(nil)
		call := func(uid uint32, want codes.Code) (end func()) {
			t.Helper()
			ctx, end := context.WithCancel(peer.NewContext(t.Context(), &peer.Peer{AuthInfo: unixsock.AuthInfo{Peer: &unixsock.Peer{UID: uid}}}))
			if _, err := open(ctx, &tap.Info{FullMethodName: workloadpb.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName}); status.Code(err) != want {
				t.Errorf("a call of user %d = %v; want %v", uid, err, want)
			}
			return end
		}
		first := call(1, codes.OK)
		second := call(1, codes.ResourceExhausted)
		other := call(2, codes.OK)
		second() // gives nothing back: it took nothing
		synctest.Wait()
		call(1, codes.ResourceExhausted)()
		first()
		synctest.Wait()
		third := call(1, codes.OK)
		third()
		other()
		synctest.Wait()
	})
}

func TestConnectionsAreLimitedAndReleased(t *testing.T) {
	dir, err := os.MkdirTemp("", "me") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	lis, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	met := 0
	creds := NewLimit(1).Credentials(func(*unixsock.Peer) { met++ })
	accept := func() (net.Conn, error) {
		client, err := net.Dial("unix", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		server, err := lis.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn, info, err := creds.ServerHandshake(server)
		if err == nil {
			if _, ok := info.(unixsock.AuthInfo); !ok {
				t.Fatalf("auth info is %T", info)
			}
		}
		return conn, err
	}
	first, err := accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := accept(); err == nil {
		t.Error("a second connection was let in")
	}
	first.Close()
	first.Close() // counts once
	second, err := accept()
	if err != nil {
		t.Fatalf("after the first closed: %v", err)
	}
	if _, err := accept(); err == nil {
		t.Error("closing twice counted twice")
	}
	if met != 2 {
		t.Errorf("%d processes were met; want the 2 that were let in", met)
	}
	second.Close()
}

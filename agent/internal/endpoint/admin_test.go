// Who may use the admin socket.

package endpoint

import (
	"context"
	"os"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/unixsock"
)

func TestAdmins(t *testing.T) {
	unary, stream := Admins([]uint32{77})
	for uid, want := range map[uint32]codes.Code{
		0: codes.OK, uint32(os.Geteuid()): codes.OK, 77: codes.OK, 4242: codes.PermissionDenied,
	} {
		ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: unixsock.AuthInfo{Peer: &unixsock.Peer{UID: uid}}})
		_, err := unary(ctx, nil, nil, func(context.Context, any) (any, error) { return nil, nil })
		if status.Code(err) != want {
			t.Errorf("uid %d: unary call = %v; want %v", uid, err, want)
		}
		err = stream(nil, fakeStream{ctx: ctx}, nil, func(any, grpc.ServerStream) error { return nil })
		if status.Code(err) != want {
			t.Errorf("uid %d: stream = %v; want %v", uid, err, want)
		}
	}
	if _, err := unary(t.Context(), nil, nil, nil); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a caller that nobody names = %v; want PermissionDenied", err)
	}
}

type fakeStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s fakeStream) Context() context.Context { return s.ctx }

// Whole calls in a testing/synctest bubble: no socket, and hours that take no time.

package sdktest_test

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/grpcauth"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// shop is a trust domain in which web may call orders, over HTTP, gRPC and plain
// connections.
type shop struct {
	*sdktest.TD
	orders, web *sdk.Identity
	client      *http.Client
	grpc        testgrpc.TestServiceClient
}

func newShop(t *testing.T) *shop {
	td := sdktest.NewInMemory(t)
	td.Allow("web", "orders")
	s := &shop{TD: td, orders: td.Workload("orders"), web: td.Workload("web")}

	srv := &http.Server{
		ReadHeaderTimeout: time.Minute,
		TLSConfig:         s.orders.ServerTLS(),
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, 0),
		Handler: httpauth.Handler(s.orders, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if peer, ok := sdk.PeerFromContext(r.Context()); ok {
				_, _ = io.WriteString(w, peer.ID.String())
			}
		})),
	}
	go srv.ServeTLS(td.Listen("orders:443"), "", "")
	t.Cleanup(func() { srv.Close() })
	s.client = httpauth.Client(s.web, sdk.Service("orders"))

	rpc := grpc.NewServer(grpcauth.ServerOptions(s.orders)...)
	testgrpc.RegisterTestServiceServer(rpc, stuck{})
	go rpc.Serve(td.Listen("orders:8443"))
	t.Cleanup(rpc.Stop)
	cc, err := grpc.NewClient("dns:///orders:8443", grpcauth.DialOptions(s.web, sdk.Service("orders"))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	s.grpc = testgrpc.NewTestServiceClient(cc)

	lis := s.orders.Listener(td.Listen("orders:5432"))
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	t.Cleanup(func() { lis.Close() })
	return s
}

// stuck has no method but one that lasts as long as its call may.
type stuck struct {
	testgrpc.UnimplementedTestServiceServer
}

// FullDuplexCall implements the service.
func (stuck) FullDuplexCall(stream testgrpc.TestService_FullDuplexCallServer) error {
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	<-stream.Context().Done()
	return stream.Context().Err()
}

// get makes one request.
func (s *shop) get() (string, error) {
	res, err := s.client.Get("https://orders/orders/1")
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

// everyWay makes a call of each kind, each on a connection that may be open already
// but the last, and gives the errors of those that do not go through.
func (s *shop) everyWay(t *testing.T) []error {
	var errs []error
	if _, err := s.get(); err != nil {
		errs = append(errs, err)
	}
	// Unimplemented is the handler's answer.
	if _, err := s.grpc.UnaryCall(t.Context(), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Unimplemented {
		errs = append(errs, err)
	}
	conn, err := s.web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", "orders:5432")
	if err == nil {
		defer conn.Close()
		_, _ = io.WriteString(conn, "x") // the answer says whether it got there
		_, err = io.ReadFull(conn, make([]byte, 1))
	}
	if err != nil {
		errs = append(errs, err)
	}
	return errs
}

func TestCallsInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(t)
		if who, err := s.get(); err != nil || who != "spiffe://sdktest.test/web" {
			t.Errorf("GET = %q, %v", who, err)
		}
		if errs := s.everyWay(t); len(errs) > 0 {
			t.Error(errs)
		}
	})
}

// Each change takes effect on all three ways of calling, and so does its opposite.
func TestChangesInABubble(t *testing.T) {
	for name, tc := range map[string]struct {
		change, back func(*shop)
		reason       policy.Reason // of the denial over HTTP; "": there is no connection
		left         int           // ways that are not shut
	}{
		"Deny": {
			func(s *shop) { s.Deny("web", "orders") },
			func(s *shop) { s.Forget("web", "orders"); s.Allow("web", "orders") }, policy.DenyRule, 0,
		},
		"Revoke the caller": {func(s *shop) { s.Revoke("web") }, func(s *shop) { s.Rotate("web") }, "", 0},
		"Revoke the server": {func(s *shop) { s.Revoke("orders") }, func(s *shop) { s.Rotate("orders") }, "", 0},
		"Withdraw":          {func(s *shop) { s.Withdraw("web") }, func(s *shop) { s.Rotate("web") }, "", 0},
		// The connection that gRPC keeps showed an earlier X509-SVID.
		"Expire the caller": {func(s *shop) { s.Expire("web") }, func(s *shop) { s.Rotate("web") }, "", 1},
		"an hour": {
			func(*shop) { time.Sleep(time.Hour) },
			func(s *shop) { s.Rotate("web"); s.Rotate("orders") }, "", 0,
		},
		"StopAgent":  {func(s *shop) { s.StopAgent("orders") }, func(s *shop) { s.StartAgent("orders") }, policy.AgentUnavailable, 0},
		"RotateRoot": {func(s *shop) { s.RotateRoot() }, nil, "", 3},
		"RemoveRoot": {func(s *shop) { s.RemoveRoot() }, nil, "", 3}, // all get new X509-SVIDs
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newShop(t)
				if errs := s.everyWay(t); len(errs) > 0 {
					t.Fatal(errs)
				}
				tc.change(s)
				time.Sleep(2 * time.Second) // pushes take no time, new attempts up to a second
				if errs := s.everyWay(t); len(errs) != 3-tc.left {
					t.Errorf("%d ways are left; want %d: %v", 3-len(errs), tc.left, errs)
				}
				if tc.back == nil {
					return
				}
				var denied *sdk.DeniedError
				if _, err := s.get(); errors.As(err, &denied) != (tc.reason != "") || denied != nil && denied.Reason != tc.reason {
					t.Errorf("GET = %v; want the reason %q", err, tc.reason)
				}
				tc.back(s)
				time.Sleep(time.Minute) // gRPC's clients wait for long
				if errs := s.everyWay(t); len(errs) > 0 {
					t.Errorf("well again: %v", errs)
				}
			})
		})
	}
}

// What is under way ends as it does over sockets, and the moment is exact.
func TestStreamsEndInABubble(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*shop)
		want   codes.Code
		after  time.Duration // exactly
	}{
		"denied":  {func(s *shop) { s.Deny("web", "orders") }, codes.PermissionDenied, 0},
		"revoked": {func(s *shop) { s.Revoke("web") }, codes.Unavailable, 0},
		"expired": {func(*shop) {}, codes.Unavailable, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newShop(t)
				stream, err := s.grpc.FullDuplexCall(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if _, err := stream.Header(); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				tc.change(s)
				_, err = stream.Recv()
				if took := time.Since(began); status.Code(err) != tc.want || took != tc.after {
					t.Errorf("the stream ended after %v with %v; want %v after %v", took, err, tc.want, tc.after)
				}
			})
		})
	}
}

// A partner's network is the same one.
func TestPartnersCallInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShop(t)
		partner := s.Partner("partner.test")
		s.Allow(partner.ID("web").String(), "orders")
		s.client = httpauth.Client(partner.Workload("web"), sdk.ID("spiffe://sdktest.test/orders"))
		if who, err := s.get(); err != nil || who != "spiffe://partner.test/web" {
			t.Errorf("GET = %q, %v", who, err)
		}
		s.Distrust(partner)
		time.Sleep(time.Second)
		if _, err := s.get(); err == nil {
			t.Error("the partner calls after the end of the federation")
		}
	})
}

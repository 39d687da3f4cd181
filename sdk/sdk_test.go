// What Open promises: an identity that is kept current, or an error that
// names the cause.

package sdk_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// roles are what this program is instead of a test when a test has started it.
var roles = []func() (itIs bool){runCrowd, runReadingEnds}

func TestMain(m *testing.M) {
	for _, run := range roles {
		if run() {
			return
		}
	}
	goleak.VerifyTestMain(m)
}

// eventually waits until what is true; the agent's pushes are asynchronous.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func TestOpenGivesTheWorkloadItsIdentity(t *testing.T) {
	td := sdktest.New(t)
	t.Setenv(sdk.SocketEnv, td.Address("ns/shop/orders"))
	id, err := sdk.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer id.Close()
	if got, want := id.ID().String(), "spiffe://sdktest.test/ns/shop/orders"; got != want {
		t.Errorf("ID() = %s; want %s", got, want)
	}
	bundle, err := id.GetX509BundleForTrustDomain(id.ID().TrustDomain())
	if err != nil || !bundle.Equal(td.Bundle()) {
		t.Errorf("trust bundle = %v, %v; want the trust domain's", bundle, err)
	}
}

func TestOpenNamesWhatIsInTheWay(t *testing.T) {
	dir, err := os.MkdirTemp("", "sdk") //nolint:usetesting // t.TempDir is too long for a socket path
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	td := sdktest.New(t)
	withdrawn := td.Address("withdrawn")
	td.Withdraw("withdrawn")

	for name, tc := range map[string]struct {
		address string
		want    sdk.NotReadyReason
	}{
		"no socket":         {"unix://" + filepath.Join(dir, "none.sock"), sdk.SocketAbsent},
		"nobody listens":    {"unix://" + deadSocket(t, dir), sdk.SocketDead},
		"no entry":          {withdrawn, sdk.NoMatchingEntry},
		"silent agent":      {"unix://" + silentAgent(t, dir), sdk.AgentNotSynced},
		"not an agent":      {"unix://" + emptyServer(t, dir), sdk.BadAnswer},
		"TCP":               {"tcp://127.0.0.1:8080", sdk.BadAddress},
		"relative path":     {"unix:api.sock", sdk.BadAddress},
		"authority":         {"unix://run/api.sock", sdk.BadAddress},
		"query":             {"unix:///run/api.sock?x=1", sdk.BadAddress},
		"empty query":       {"unix:///run/api.sock?", sdk.BadAddress},
		"fragment":          {"unix:///run/api.sock#x", sdk.BadAddress},
		"other scheme":      {"http:///run/api.sock", sdk.BadAddress},
		"a path, not a URI": {"/run/api.sock", sdk.BadAddress},
		"user":              {"unix://me@/run/api.sock", sdk.BadAddress},
		"long path":         {"unix:///" + strings.Repeat("a", 200), sdk.BadAddress},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			_, err := sdk.Open(t.Context(), sdk.WithAgentAddress(tc.address), sdk.WithStartupTimeout(300*time.Millisecond), quiet)
			var notReady *sdk.NotReadyError
			if !errors.As(err, &notReady) {
				t.Fatalf("Open = %v; want a *NotReadyError", err)
			}
			if notReady.Reason != tc.want || notReady.Hint == "" || notReady.Err == nil {
				t.Errorf("Open = %v; want reason %s, a hint and a cause", err, tc.want)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("Open took %v", took)
			}
		})
	}
}

func TestOpenEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := sdk.Open(ctx, sdk.WithAgentAddress("unix:///nonexistent/api.sock"), sdk.WithStartupTimeout(time.Hour), quiet)
	var notReady *sdk.NotReadyError
	if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &notReady) || notReady.Reason != sdk.SocketAbsent {
		t.Errorf("Open = %v; want deadline exceeded and SOCKET_ABSENT", err)
	}
}

func TestOpenIsReadyAsSoonAsTheAgentComes(t *testing.T) {
	td := sdktest.New(t)
	address := td.Address("web")
	td.StopAgent("web")
	opened := make(chan error, 1)
	go func() {
		id, err := sdk.Open(t.Context(), sdk.WithAgentAddress(address), sdk.WithStartupTimeout(20*time.Second), quiet)
		if err == nil {
			id.Close()
		}
		opened <- err
	}()
	time.Sleep(100 * time.Millisecond) // let it fail a few times; nothing depends on how often
	td.StartAgent("web")
	if err := <-opened; err != nil {
		t.Errorf("Open = %v", err)
	}
}

// In a bubble, where time is exact: however long the agent was away, a process is ready
// within a second of its return, and one that does not wait for so long learns why.
func TestOpenIsReadyWithinASecondOfTheAgent(t *testing.T) {
	for _, away := range []time.Duration{time.Millisecond, 10 * time.Second, time.Minute} {
		t.Run(away.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				td := sdktest.NewInMemory(t)
				as := td.As("web")
				td.StopAgent("web")
				_, err := sdk.Open(t.Context(), as, quiet)
				if notReady, ok := errors.AsType[*sdk.NotReadyError](err); !ok || notReady.Reason != sdk.SocketDead {
					t.Fatalf("Open = %v; want SOCKET_DEAD", err)
				}
				var back time.Time
				time.AfterFunc(away, func() { back = time.Now(); td.StartAgent("web") })
				id, err := sdk.Open(t.Context(), as, quiet, sdk.WithStartupTimeout(time.Hour))
				if err != nil {
					t.Fatal(err)
				}
				defer id.Close()
				took := time.Since(back)
				t.Logf("ready %v after the agent", took)
				if took > time.Second {
					t.Errorf("ready %v after the agent; want at most 1 s", took)
				}
			})
		})
	}
}

func TestRotationReachesTheProcess(t *testing.T) {
	td := sdktest.New(t)
	id := td.Workload("web")
	before := serialOf(t, id)
	rotated := make(chan string, 8)
	stop := id.OnRotate(func() { rotated <- serialOf(t, id) })
	td.Rotate("web")
	select {
	case now := <-rotated:
		if now == before {
			t.Error("OnRotate was called with the old X509-SVID in place")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("OnRotate was not called")
	}
	stop()
	now := serialOf(t, id)
	td.Rotate("web")
	eventually(t, "a new X509-SVID", func() bool { return serialOf(t, id) != now })
	if len(rotated) > 0 {
		t.Error("a stopped hook was called")
	}
}

func TestWithdrawnIdentityIsNotUsed(t *testing.T) {
	td := sdktest.New(t)
	id := td.Workload("web")
	td.Withdraw("web")
	eventually(t, "no X509-SVID", func() bool { _, err := id.GetX509SVID(); return err != nil })
	if !id.ID().IsZero() {
		t.Errorf("ID() = %s; want none", id.ID())
	}
	td.Rotate("web")
	eventually(t, "an X509-SVID again", func() bool { _, err := id.GetX509SVID(); return err == nil })
}

func TestIdentityOutlivesItsAgentUntilItExpires(t *testing.T) {
	t.Parallel()
	td := sdktest.New(t)
	td.SetTTL(3 * time.Second)
	id := td.Workload("web")
	td.StopAgent("web")
	own, err := id.GetX509SVID()
	if err != nil {
		t.Fatalf("without the agent: %v", err)
	}
	eventually(t, "expiry", func() bool { _, err := id.GetX509SVID(); return err != nil })
	if now := time.Now(); now.Before(own.Certificates[0].NotAfter) {
		t.Errorf("given up at %v, before it expired at %v", now, own.Certificates[0].NotAfter)
	}
	td.SetTTL(time.Hour)
	td.Rotate("web")
	td.StartAgent("web")
	eventually(t, "an X509-SVID again", func() bool { _, err := id.GetX509SVID(); return err == nil })
}

func TestClosedIdentityIsOfNoUse(t *testing.T) {
	td := sdktest.New(t)
	id := td.Workload("web")
	id.Close()
	id.Close()
	if _, err := id.GetX509SVID(); err == nil {
		t.Error("a closed identity still gives its X509-SVID")
	}
}

func TestTargetsNameExactlyOneWorkload(t *testing.T) {
	td := sdktest.New(t)
	web, orders := td.Workload("web"), td.Workload("orders")
	server := listen(t, orders)
	td.Allow("web", "orders")
	for name, tc := range map[string]struct {
		to   sdk.Target
		want string // in the error; empty: connects
	}{
		"service":             {sdk.Service("orders"), ""},
		"id":                  {sdk.ID("spiffe://sdktest.test/orders"), ""},
		"zero":                {sdk.Target{}, "names nobody"},
		"other service":       {sdk.Service("refunds"), "spiffe://sdktest.test/refunds is expected"},
		"other trust domain":  {sdk.ID("spiffe://evil.test/orders"), "is expected"},
		"prefix":              {sdk.Service("order"), "is expected"},
		"empty service":       {sdk.Service(""), "no name"},
		"malformed service":   {sdk.Service("a//b"), "sdk.Service"},
		"service with slash":  {sdk.Service("/orders"), "sdk.Service"},
		"dots":                {sdk.Service("../orders"), "sdk.Service"},
		"malformed id":        {sdk.ID("https://sdktest.test/orders"), "sdk.ID"},
		"trust domain, no ID": {sdk.ID("spiffe://sdktest.test"), "names a trust domain"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := web.DialTLS(tc.to)(t.Context(), "tcp", server)
			if err == nil {
				conn.Close()
			}
			got := ""
			if err != nil {
				got = err.Error()
			}
			if (tc.want == "") != (err == nil) || !strings.Contains(got, tc.want) {
				t.Errorf("dial = %v; want %q", err, tc.want)
			}
		})
	}
}

func TestDeniedErrorCannotForgeLogLines(t *testing.T) {
	err := &sdk.DeniedError{Reason: "NO_GRANT", DecisionID: "ab\n{\"level\":\"ERROR\"}", Hint: "\x1b[31mred\u2028"}
	if strings.ContainsAny(err.Error(), "\n\x1b\u2028") {
		t.Errorf("Error() = %q", err.Error())
	}
	back, ok := sdk.DeniedFromStatus(err.GRPCStatus().Err())
	if !ok || !cmp.Equal(back, err) {
		t.Errorf("through a gRPC status: %v, %v; want %v", back, ok, err)
	}
}

// A program that does not wait for its agent learns why there is no identity, lets
// nobody in until then, and serves without being started again.
func TestOpenWithoutWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := sdktest.NewInMemory(t)
		td.Allow("web", "orders")
		as := td.As("orders")
		td.StopAgent("orders")
		begun := time.Now()
		id, err := sdk.Open(t.Context(), as, quiet, sdk.WithoutWaiting())
		if took := time.Since(begun); err != nil || took > 0 {
			t.Fatalf("Open = %v after %v; want nil at once", err, took)
		}
		defer id.Close()
		srv := &http.Server{
			ReadHeaderTimeout: time.Minute, TLSConfig: id.ServerTLS(), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
			Handler: httpauth.Handler(id, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})),
		}
		go srv.ServeTLS(td.Listen("orders:443"), "", "")
		t.Cleanup(func() { srv.Close() })
		web := httpauth.Client(td.Workload("web"), sdk.Service("orders"))

		ready := func(within time.Duration) error {
			ctx, cancel := context.WithTimeout(t.Context(), within)
			defer cancel()
			return id.Ready(ctx)
		}
		err = ready(time.Minute)
		if notReady, ok := errors.AsType[*sdk.NotReadyError](err); !ok || notReady.Reason != sdk.SocketDead || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Ready = %v; want SOCKET_DEAD, and that the time is over", err)
		}
		if err := get(t.Context(), web, "orders:443"); err == nil {
			t.Error("a call was served without an identity")
		}
		td.StartAgent("orders")
		if err := ready(time.Second); err != nil {
			t.Fatalf("Ready = %v; want nil within a second of the agent", err)
		}
		if err := get(t.Context(), web, "orders:443"); err != nil {
			t.Errorf("with an identity: %v", err)
		}
		if err := ready(0); err != nil {
			t.Errorf("Ready = %v once it was", err)
		}
	})
}

func TestCloseEndsReady(t *testing.T) {
	id, err := sdk.Open(t.Context(), sdk.WithAgentAddress("unix:///nonexistent/api.sock"), sdk.WithoutWaiting(), sdk.WithLogger(nil))
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() { waited <- id.Ready(t.Context()) }()
	id.Close()
	if err := <-waited; err == nil {
		t.Error("Ready = nil of an identity that was closed before it came")
	}
}

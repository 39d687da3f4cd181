// What callers read where no upstream has answered: the same over each protocol.

package sidecar

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"merlon.dev/policy/denial"
	"merlon.dev/sdk"
)

// h2c is an ordinary client that speaks HTTP/2 in the plain, or over what dial gives.
func h2c(t testing.TB, dial func(context.Context, string, string) (net.Conn, error)) *http.Client {
	var one http.Protocols
	one.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &one, DialContext: dial}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// direct is a client of p's outbound side, or of its inbound side as web.
func (p *pair) direct(t testing.TB, protocol string, inbound bool) *http.Client {
	var d net.Dialer
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		return d.DialContext(ctx, network, p.outbound.addrs[0])
	}
	alpn := "http/1.1"
	if protocol != "http" {
		alpn = "h2"
	}
	if inbound {
		if p.web == nil {
			p.web = p.td.Workload("web")
		}
		secured := p.web.DialTLS(sdk.Service("orders"), alpn)
		dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return secured(ctx, network, p.inbound.addrs[0])
		}
	}
	if protocol != "http" {
		return h2c(t, dial)
	}
	transport := &http.Transport{DialContext: dial}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// ill are apps that do not answer: nobody, one that closes, and one that says nothing.
func ill(t testing.TB) map[string]string {
	away := listen(t)
	away.Close()
	closing, silent := listen(t), listen(t)
	go func() {
		for {
			conn, err := closing.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 1))
			conn.Close()
		}
	}()
	return map[string]string{"UPSTREAM_UNREACHABLE": away.Addr().String(), "UPSTREAM_BROKE_OFF": closing.Addr().String(), "UPSTREAM_TIMEOUT": silent.Addr().String()}
}

func TestFailuresAreToldAlikeOverHTTP(t *testing.T) {
	want := map[string]int{"UPSTREAM_UNREACHABLE": 503, "UPSTREAM_BROKE_OFF": 502, "UPSTREAM_TIMEOUT": 504}
	for _, protocol := range []string{"http", "http2"} {
		for reason, app := range ill(t) {
			if protocol == "http2" && reason != "UPSTREAM_UNREACHABLE" {
				app = h2cApp(t, reason)
			}
			p := startPairWith(t, protocol, app, func(c *Config) { c.ResponseTimeout = time.Second })
			res, text := do(t, p.direct(t, protocol, true), "GET", "http://orders/", nil)
			var got struct {
				Type, Title, Reason, Detail string
				Status                      int
			}
			if err := json.Unmarshal([]byte(text), &got); err != nil {
				t.Errorf("%s %s: %q: %v", protocol, reason, text, err)
				continue
			}
			if res.StatusCode != want[reason] || got.Status != want[reason] || got.Reason != reason || got.Title == "" || got.Detail != "" ||
				res.Header.Get("Content-Type") != denial.ProblemContentType || res.Header.Get("Cache-Control") != "no-store" {
				t.Errorf("%s %s: %s %v %+v; want status %d, and nothing of the inside", protocol, reason, res.Status, res.Header, got, want[reason])
			}
			if line := p.inbound.logged(1)[0]; line["failure"] != reason || line["err"] == nil {
				t.Errorf("%s %s: the access log has %v", protocol, reason, line)
			}
			if n := p.inbound.metric("merlon_sidecar_failures_total", "failure", reason, "direction", "inbound"); n != 1 {
				t.Errorf("%s %s: counted %v times", protocol, reason, n)
			}
			if reason != "UPSTREAM_UNREACHABLE" {
				continue
			}
			p.inbound.stop() // now the sidecar of the caller has no upstream
			_, text = do(t, p.direct(t, protocol, false), "GET", "http://orders/", nil)
			if err := json.Unmarshal([]byte(text), &got); err != nil || got.Reason != reason || !strings.Contains(got.Detail, p.inbound.addrs[0]) {
				t.Errorf("%s: the own app is told %q; want why", protocol, text)
			}
		}
	}
}

// h2cApp is one of HTTP/2 that breaks off, or says nothing.
func h2cApp(t testing.TB, reason string) string {
	var one http.Protocols
	one.SetUnencryptedHTTP2(true)
	lis := listen(t)
	srv := &http.Server{Protocols: &one, ReadHeaderTimeout: time.Minute}
	srv.Handler = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if reason == "UPSTREAM_BROKE_OFF" {
			srv.Close()
		}
		<-r.Context().Done()
	})
	go srv.Serve(lis)
	t.Cleanup(func() { srv.Close() })
	return lis.Addr().String()
}

// A gRPC call gets a status that is whole in one list of fields.
func TestFailuresAreGRPCStatuses(t *testing.T) {
	p := startPair(t, "grpc", ill(t)["UPSTREAM_UNREACHABLE"])
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://orders/shop.Orders/Get", strings.NewReader("\x00\x00\x00\x00\x00"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	res, err := p.direct(t, "grpc", true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || len(body) != 0 || res.StatusCode != 200 || len(res.Trailer) != 0 || res.Header.Get("Content-Type") != "application/grpc" || res.Header.Get("Grpc-Status") != "14" {
		t.Errorf("%v %v, body %q, trailers %v, %v", res.Status, res.Header, body, res.Trailer, err)
	}
	_, err = grpcClient(t, p.outbound.addrs[0]).UnaryCall(t.Context(), &testgrpc.SimpleRequest{})
	st := status.Convert(err)
	if info, ok := denial.Info(st); st.Code() != codes.Unavailable || !ok || info.GetReason() != "UPSTREAM_UNREACHABLE" || strings.Contains(st.Message(), "127.0.0.1") {
		t.Errorf("%v %v; want the reason, and nothing of the inside", st, info)
	}
	if _, ok := denial.FromStatus(err); ok {
		t.Error("a failure passes for a denial")
	}
}

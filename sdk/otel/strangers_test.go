// What others can make of the metrics of a service: nothing that grows with what they
// invent. And what is seen of those who do not get in.

package otel_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// Methods, paths and hosts are the caller's to invent.
func TestInventionsMakeNoTimeSeries(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	w := open(t)
	for i := range 20 {
		for _, path := range []string{"/nowhere/", "/denied/"} {
			req, err := http.NewRequestWithContext(t.Context(), fmt.Sprintf("BREW%d", i), fmt.Sprintf("%s%s%d", w.url, path, i), nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Host = fmt.Sprintf("host%d.test", i)
			if res, err := w.http.Do(req); err == nil {
				res.Body.Close()
			} else if _, ok := errors.AsType[*sdk.DeniedError](err); !ok {
				t.Fatal(err)
			}
		}
	}
	// A path that is ambiguous, with which nothing is done.
	if err := w.get(t.Context(), "/a//b"); err == nil {
		t.Error("an ambiguous path was served")
	}
	w.stop()
	for name, want := range map[string]map[string]uint64{
		"http.server.request.duration": {"method=_OTHER status_code=404": 20, "method=_OTHER status_code=403": 20, "method=GET status_code=400": 1},
		"http.client.request.duration": {"method=_OTHER status_code=404": 20, "method=_OTHER status_code=403": 20, "method=GET status_code=400": 1},
		"merlon.decisions":             {"decision=allow reason=ALLOWED": 20, "decision=deny reason=PATH": 20, "decision=deny reason=BAD_REQUEST": 1},
	} {
		m := c.metric(name)
		keys := []string{"http.request.method", "http.response.status_code"}
		if strings.HasPrefix(name, "merlon.") {
			keys = []string{"merlon.decision", "merlon.reason"}
		}
		got := counts(m, keys...)
		for attrs, n := range want {
			if got[attrs] != n {
				t.Errorf("%s: %v; want %d × %s", name, got, n, attrs)
			}
		}
		if series := len(m.GetHistogram().GetDataPoints()) + len(m.GetSum().GetDataPoints()); series != len(want) {
			t.Errorf("%s has %d time series; want %d", name, series, len(want))
		}
	}
	if n := len(c.find("HTTP", serverSpan)); n != 40 {
		t.Errorf("%d spans of methods that nobody knows; want 40", n)
	}
}

// Of a handshake is seen whether the peer was refused for what it is, or gave up.
func TestOutcomesOfHandshakes(t *testing.T) {
	c, address := collect(t, "grpc")
	export(t, "grpc", address)
	w := open(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	guarded := w.orders.Listener(lis)
	accepted := make(chan struct{})
	go func() {
		defer close(accepted)
		for {
			conn, err := guarded.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	other := sdktest.New(t).SVID("web")
	for name, connect := range map[string]func(net.Conn) error{
		"a stranger": func(raw net.Conn) error {
			conn := tls.Client(raw, &tls.Config{
				InsecureSkipVerify: true, // a stranger takes what it gets
				Certificates:       []tls.Certificate{{Certificate: [][]byte{other.Certificates[0].Raw}, PrivateKey: other.PrivateKey}},
			})
			return conn.HandshakeContext(t.Context())
		},
		"no TLS": func(raw net.Conn) error {
			_, err := io.WriteString(raw, "GET / HTTP/1.1\r\n\r\n")
			return err
		},
	} {
		raw, err := net.Dial("tcp", lis.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_ = raw.SetDeadline(time.Now().Add(30 * time.Second))
		if err := connect(raw); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_, _ = io.Copy(io.Discard, raw) // until it is cut
		raw.Close()
	}
	conn, err := w.web.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, conn)
	conn.Close()
	guarded.Close()
	<-accepted
	w.stop()
	got := counts(c.metric("merlon.handshakes"), "merlon.handshake.role", "merlon.handshake.outcome")
	for attrs, n := range map[string]uint64{
		"role=server outcome=refused": 1, "role=server outcome=failed": 1, "role=server outcome=accepted": 1, "role=client outcome=accepted": 1,
	} {
		if got[attrs] != n {
			t.Errorf("handshakes: %v; want %d × %s", got, n, attrs)
		}
	}
}

// Prometheus can scrape a service directly.
func TestPrometheus(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host, port, _ := net.SplitHostPort(lis.Addr().String())
	lis.Close()
	t.Setenv("OTEL_METRICS_EXPORTER", "prometheus")
	t.Setenv("OTEL_EXPORTER_PROMETHEUS_HOST", host)
	t.Setenv("OTEL_EXPORTER_PROMETHEUS_PORT", port)
	w := open(t)
	w.calls(t)
	scraper := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+net.JoinHostPort(host, port)+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := scraper.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	page, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"http_server_request_duration_seconds_bucket", "rpc_server_call_duration_seconds_count", "merlon_decisions_total", "merlon_handshakes_total", "merlon_x509_svid_time_left_seconds", "merlon_policy_age_seconds", "merlon_connections", "merlon_calls"} {
		if !strings.Contains(string(page), "\n"+name) {
			t.Errorf("%s is missing of\n%s", name, page)
		}
	}
}

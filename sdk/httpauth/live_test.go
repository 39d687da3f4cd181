// Requests under way when the policy changes, over HTTP/1.1 and HTTP/2.

package httpauth_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/policy"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// clients speak one protocol each, as web.
var clients = map[string]func(t *testing.T, td *sdktest.TD, url string) *http.Client{
	"HTTP/1.1": func(t *testing.T, td *sdktest.TD, url string) *http.Client {
		td.Workload("web")
		transport := &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return dial(t, url, td, "http/1.1"), nil }}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport}
	},
	"HTTP/2": func(t *testing.T, td *sdktest.TD, _ string) *http.Client {
		return client(t, td.Workload("web"), sdk.Service("orders"))
	},
}

// reasonOf is the reason of a denial, however the client says it.
func reasonOf(res *http.Response, err error) policy.Reason {
	if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
		return denied.Reason
	}
	if err != nil || res.StatusCode != http.StatusForbidden || res.Header.Get("X-Secret") != "" {
		return ""
	}
	defer res.Body.Close()
	var p httpauth.Problem
	if json.NewDecoder(res.Body).Decode(&p) != nil {
		return ""
	}
	return p.Reason
}

func TestPolicyEndsRequestsUnderWay(t *testing.T) {
	type handler func(w http.ResponseWriter, r *http.Request, begun chan<- struct{}) error
	tests := map[string]struct {
		handler handler
		body    bool // the client sends one that does not end
		broken  bool // the answer has begun, and breaks off
	}{
		"one that waits": {handler: func(_ http.ResponseWriter, r *http.Request, begun chan<- struct{}) error {
			begun <- struct{}{}
			<-r.Context().Done()
			return context.Cause(r.Context())
		}},
		"one that reads": {body: true, handler: func(_ http.ResponseWriter, r *http.Request, begun chan<- struct{}) error {
			begun <- struct{}{}
			_, err := io.Copy(io.Discard, r.Body)
			return err
		}},
		"one that answers too late": {handler: func(w http.ResponseWriter, r *http.Request, begun chan<- struct{}) error {
			begun <- struct{}{}
			<-r.Context().Done()
			w.Header().Set("X-Secret", "what nobody may see")
			w.WriteHeader(http.StatusOK)
			_, err := io.WriteString(w, "what nobody may see")
			return err
		}},
		"one that streams": {broken: true, handler: func(w http.ResponseWriter, _ *http.Request, begun chan<- struct{}) error {
			begun <- struct{}{}
			for {
				if _, err := io.WriteString(w, "more\n"); err != nil {
					return err
				}
				if err := http.NewResponseController(w).Flush(); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
			}
		}},
		"one that nobody reads": {broken: true, handler: func(w http.ResponseWriter, _ *http.Request, begun chan<- struct{}) error {
			begun <- struct{}{}
			for {
				if _, err := w.Write(make([]byte, 1<<20)); err != nil {
					return err
				}
			}
		}},
	}
	for name, tt := range tests {
		for protocol, connect := range clients {
			t.Run(name+" over "+protocol, func(t *testing.T) {
				td := sdktest.New(t)
				td.Allow("web", "orders")
				td.CompilePolicy()
				begun, ended := make(chan struct{}, 1), make(chan error, 1)
				url := start(t, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if !strings.HasPrefix(r.Proto, protocol[:6]) {
						t.Errorf("the protocol is %s", r.Proto)
					}
					ended <- tt.handler(w, r, begun)
				}))
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				var body io.Reader
				if tt.body {
					reader, writer := io.Pipe()
					defer writer.Close()
					body = reader
				}
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/", body)
				if err != nil {
					t.Fatal(err)
				}
				c := connect(t, td, url)
				type outcome struct {
					res *http.Response
					err error
				}
				got := make(chan outcome, 1)
				go func() { res, err := c.Do(req); got <- outcome{res, err} }()
				select {
				case <-begun:
				case o := <-got:
					t.Fatalf("the request never began: %v, %v", o.res, o.err)
				}
				if !tt.broken {
					td.Deny("web", "orders")
					o := <-got
					if reasonOf(o.res, o.err) != policy.DenyRule {
						t.Errorf("the client got %v, %v; want the denial", o.res, o.err)
					}
				} else {
					o := <-got
					if o.err != nil {
						t.Fatal(o.err)
					}
					td.Deny("web", "orders")
					if err := <-ended; err == nil {
						t.Error("the handler could write on")
					}
					ended <- errors.New("seen")
					if _, err := io.Copy(io.Discard, o.res.Body); err == nil {
						t.Error("the answer looks whole")
					}
					o.res.Body.Close()
				}
				if err := <-ended; err == nil {
					t.Error("the handler saw no error")
				}
			})
		}
	}
}

func TestPolicyCutsAHijackedConnection(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	ended := make(chan error, 1)
	url := start(t, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			ended <- err
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
		for {
			line, err := buffered.ReadString('\n')
			if err != nil {
				ended <- err
				return
			}
			io.WriteString(conn, line)
		}
	}))
	conn := dial(t, url, td, "http/1.1")
	if res := roundTrip(t, conn, "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n"); res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(res.Status)
	}
	io.WriteString(conn, "hello\n")
	answers := bufio.NewReader(conn)
	if line, err := answers.ReadString('\n'); err != nil || line != "hello\n" {
		t.Fatalf("%q, %v", line, err)
	}
	td.Deny("web", "orders")
	if _, err := answers.ReadString('\n'); err == nil {
		t.Error("the connection still speaks")
	}
	if err := <-ended; err == nil {
		t.Error("the handler saw no error")
	}
}

// What handlers can do with a writer they still can.
func TestHandlersKeepTheirWriter(t *testing.T) {
	td := sdktest.New(t)
	td.Allow("web", "orders")
	file := filepath.Join(t.TempDir(), "file")
	text := strings.Repeat("a line\n", 20_000)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) })
	mux.HandleFunc("/flush", func(w http.ResponseWriter, _ *http.Request) {
		c := http.NewResponseController(w)
		if err := errors.Join(c.SetReadDeadline(time.Time{}), c.SetWriteDeadline(time.Now().Add(time.Minute)), c.Flush()); err != nil {
			t.Error(err)
		}
		if _, ok := w.(http.Flusher); !ok {
			t.Error("it is no http.Flusher")
		}
		io.WriteString(w, "flushed")
	})
	url := start(t, td.Workload("orders"), mux)
	for _, connect := range clients {
		c := connect(t, td, url)
		for path, want := range map[string]string{"/file": text, "/flush": "flushed"} {
			if res, body, err := get(c, url+path); err != nil || body != want {
				t.Errorf("%s over %v: %d bytes, %v", path, res, len(body), err)
			}
		}
	}
}

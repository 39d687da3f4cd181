// What a decided HTTP call costs, on an open and on a new connection.

package httpauth_test

import (
	"io"
	"net/http"
	"testing"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	"merlon.dev/sdk/sdktest"
)

// One call over an open connection: client, TLS, decision, handler, all in this
// process; by the compiled policy, and by the agent over its socket.
func BenchmarkCall(b *testing.B) {
	for _, by := range []string{"program", "agent"} {
		b.Run(by, func(b *testing.B) {
			td := sdktest.New(b)
			td.Allow("web", "orders")
			if by == "program" {
				td.CompilePolicy()
			}
			url := start(b, td.Workload("orders"), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, _ = io.WriteString(w, "ok")
			}))
			c := client(b, td.Workload("web"), sdk.Service("orders"))
			if _, _, err := get(c, url+"/"); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, _, err := get(c, url+"/"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// One call over a connection of its own.
func BenchmarkHandshakeAndCall(b *testing.B) {
	td := sdktest.New(b)
	td.Allow("web", "orders")
	url := start(b, td.Workload("orders"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	c := &http.Client{Transport: httpauth.Transport(td.Workload("web"), sdk.Service("orders"))}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := get(c, url+"/"); err != nil {
			b.Fatal(err)
		}
		c.CloseIdleConnections()
	}
}

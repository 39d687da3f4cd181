// Command reverseproxy is what the sidecar is measured against: the same two hops,
// made of net/http, httputil.ReverseProxy and sdk/httpauth.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"os"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "reverseproxy:", err)
		os.Exit(1)
	}
}

// run serves "inbound PROTOCOL LISTEN APP" or "outbound PROTOCOL LISTEN SERVICE UPSTREAM",
// where PROTOCOL is http for HTTP/1.1 or grpc for HTTP/2.
func run(args []string) error {
	id, err := sdk.Open(context.Background())
	if err != nil {
		return err
	}
	defer id.Close()
	if len(args) < 4 {
		return errUsage
	}
	alpn := "http/1.1"
	var protocols http.Protocols
	if protocols.SetHTTP1(true); args[1] == "grpc" {
		alpn = "h2"
		protocols = http.Protocols{}
		protocols.SetUnencryptedHTTP2(true)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true, Protocols: &protocols}
	srv := &http.Server{Addr: args[2], ReadHeaderTimeout: 10 * time.Second}
	switch {
	case len(args) == 4 && args[0] == "inbound":
		srv.TLSConfig = id.ServerTLS(alpn)
		srv.Handler = httpauth.Handler(id, to("http", args[3], transport))
		return srv.ListenAndServeTLS("", "")
	case len(args) == 5 && args[0] == "outbound":
		transport.DialTLSContext = id.DialTLS(sdk.Service(args[3]), alpn)
		transport.Protocols, transport.ForceAttemptHTTP2 = nil, alpn == "h2"
		srv.Protocols = &protocols
		srv.Handler = to("https", args[4], transport)
		return srv.ListenAndServe()
	}
	return errUsage
}

var errUsage = errors.New("give inbound PROTOCOL LISTEN APP, or outbound PROTOCOL LISTEN SERVICE UPSTREAM")

// to passes messages on as they come, which streams of gRPC need.
func to(scheme, host string, transport http.RoundTripper) http.Handler {
	return &httputil.ReverseProxy{
		Transport: transport, FlushInterval: -1, ErrorLog: log.New(io.Discard, "", 0),
		Rewrite: func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = scheme, host },
	}
}

// Command reverseproxy is what the sidecar is measured against: the same two hops,
// made of net/http, httputil.ReverseProxy and sdk/httpauth.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
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

// run serves "inbound LISTEN APP" or "outbound LISTEN SERVICE UPSTREAM".
func run(args []string) error {
	id, err := sdk.Open(context.Background())
	if err != nil {
		return err
	}
	defer id.Close()
	switch {
	case len(args) == 3 && args[0] == "inbound":
		transport := &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true}
		proxy := to("http", args[2], transport)
		srv := &http.Server{Addr: args[1], Handler: httpauth.Handler(id, proxy), TLSConfig: id.ServerTLS("http/1.1"), ReadHeaderTimeout: 10 * time.Second}
		return srv.ListenAndServeTLS("", "")
	case len(args) == 4 && args[0] == "outbound":
		transport := &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true, DialTLSContext: id.DialTLS(sdk.Service(args[2]), "http/1.1")}
		srv := &http.Server{Addr: args[1], Handler: to("https", args[3], transport), ReadHeaderTimeout: 10 * time.Second}
		return srv.ListenAndServe()
	}
	return errors.New("give inbound LISTEN APP, or outbound LISTEN SERVICE UPSTREAM")
}

func to(scheme, host string, transport http.RoundTripper) http.Handler {
	return &httputil.ReverseProxy{
		Transport: transport,
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: scheme, Host: host}) },
	}
}

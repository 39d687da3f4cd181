// The same server with go-spiffe alone, for size_test.go: who is in the trust
// domain may call.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	source, err := workloadapi.NewX509Source(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer source.Close()
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") })
	anyone := tlsconfig.AuthorizeMemberOf(spiffeid.RequireTrustDomainFromString("sdktest.test"))
	srv := &http.Server{Addr: ":8443", Handler: hello, TLSConfig: tlsconfig.MTLSServerConfig(source, source, anyone), ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(srv.ListenAndServeTLS("", ""))
}

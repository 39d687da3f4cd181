// The smallest HTTP server with the SDK, for size_test.go.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func main() {
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello") })
	srv := &http.Server{Addr: ":8443", Handler: httpauth.Handler(id, hello), TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(srv.ListenAndServeTLS("", ""))
}

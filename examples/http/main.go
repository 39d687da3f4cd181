// Command http is a service and its client over HTTP: `http serve` and `http call
// /orders/1`. Who may call what is for the policy to say.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
	_ "merlon.dev/sdk/otel" // metrics and traces, if OTEL_* asks for them
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("use: http serve ADDRESS PATH, or http call ADDRESS PATH")
	}
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()
	if address, path := os.Args[2], os.Args[3]; os.Args[1] == "serve" {
		err = serve(id, address, path)
	} else {
		err = call(id, address, path)
	}
	if err != nil {
		log.Print(err)
	}
}

func serve(id *sdk.Identity, address, path string) error {
	mux := http.NewServeMux()
	mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		caller, _ := sdk.PeerFromContext(r.Context())
		fmt.Fprintf(w, "%s for %s\n", r.URL.Path, caller.ID)
	})
	srv := &http.Server{Addr: address, Handler: httpauth.Handler(id, mux), TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 10 * time.Second}
	return srv.ListenAndServeTLS("", "")
}

// call fails with a *sdk.DeniedError, which says why, if the policy denies the call.
func call(id *sdk.Identity, address, path string) error {
	res, err := httpauth.Client(id, sdk.Service("orders")).Get("https://" + address + path)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(os.Stdout, res.Body)
	return err
}

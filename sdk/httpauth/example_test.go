// An HTTP server and client, as their users write them.

package httpauth_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/http"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func ExampleHandler() {
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()

	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		caller, _ := sdk.PeerFromContext(r.Context())
		fmt.Fprintf(w, "order %s for %s\n", r.PathValue("id"), caller.ID)
	})
	srv := &http.Server{
		Addr:              ":8443",
		Handler:           httpauth.Handler(id, mux),
		TLSConfig:         id.ServerTLS(),
		ReadHeaderTimeout: 10 * time.Second,
	}
	log.Fatal(srv.ListenAndServeTLS("", "")) // the certificate comes from id
}

func ExampleClient() {
	id, err := sdk.Open(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	defer id.Close()

	client := httpauth.Client(id, sdk.Service("orders"))
	res, err := client.Get("https://orders.internal:8443/orders/1")
	if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
		log.Fatal(denied.Reason, denied.DecisionID, denied.Hint)
	}
	if err != nil {
		log.Fatal(err)
	}
	defer res.Body.Close()
}

// Command adoption is a service that is in use already and gets its policy step by
// step: until a date it serves callers without TLS and calls that the policy denies,
// and says at /left who they are.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func main() {
	address := flag.String("address", "localhost:8080", "where to listen, for TLS and plaintext")
	until := flag.String("until", time.Now().AddDate(0, 1, 0).Format(time.DateOnly), "the day on which everything is enforced; a real service has it in its code")
	flag.Parse()
	end, err := time.Parse(time.DateOnly, *until)
	if err != nil {
		log.Fatal(err)
	}
	id, err := sdk.Open(context.Background(), sdk.WithAuditUntil(end), sdk.WithPlaintextUntil(end))
	if err != nil {
		log.Fatal(err)
	}
	lis, err := net.Listen("tcp", *address)
	if err != nil {
		log.Fatal(err)
	}
	srv := &http.Server{Handler: httpauth.Handler(id, routes(id)), ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(srv.Serve(id.ServerListener(lis)))
}

func routes(id *sdk.Identity) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		name := "somebody"
		if caller, ok := sdk.PeerFromContext(r.Context()); ok {
			name = caller.ID.String()
		}
		decision, _ := sdk.DecisionFromContext(r.Context())
		fmt.Fprintf(w, "%s for %s: %s\n", r.URL.Path, name, decision.Reason)
	})
	mux.HandleFunc("GET /left", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(id.Stats()) // the caller has gone
	})
	return mux
}

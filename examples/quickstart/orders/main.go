// Command orders is the called service of the quickstart: ordinary handlers
// behind mutual TLS and a decision on every call. It prints its address and
// SPIFFE ID once it is ready.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "orders: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	id, err := sdk.Open(ctx)
	if err != nil {
		return err
	}
	defer id.Close()
	mux := http.NewServeMux()
	mux.HandleFunc("/orders/{id}", order)
	mux.HandleFunc("GET /feed", feed)
	srv := &http.Server{Handler: httpauth.Handler(id, mux), TLSConfig: id.ServerTLS(), ReadHeaderTimeout: 5 * time.Second}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ready := map[string]string{"address": lis.Addr().String(), "spiffe_id": id.ID().String()}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { srv.Close() })
	if err := srv.ServeTLS(lis, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// order answers with what only a verified caller gets to see.
func order(w http.ResponseWriter, r *http.Request) {
	caller, _ := sdk.PeerFromContext(r.Context())
	decision, _ := sdk.DecisionFromContext(r.Context())
	fmt.Fprintf(w, "order %s for %s, by grant %s", r.PathValue("id"), caller.ID, decision.RuleID)
}

// feed never ends by itself.
func feed(w http.ResponseWriter, r *http.Request) {
	out := http.NewResponseController(w)
	for n := 0; r.Context().Err() == nil; n++ {
		if _, err := fmt.Fprintf(w, "tick %d\n", n); err != nil || out.Flush() != nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

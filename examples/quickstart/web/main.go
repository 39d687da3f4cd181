// Command web is the calling service of the quickstart. On a plain loopback
// port it takes orders from the show (/call?method=&path=, /feed) and carries
// them out against orders over mutual TLS.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
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
		fmt.Fprintln(os.Stderr, "web: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	orders := flag.String("orders", "", "URL of the orders service")
	flag.Parse()
	id, err := sdk.Open(ctx)
	if err != nil {
		return err
	}
	defer id.Close()
	f := &front{id: id, orders: *orders, client: &http.Client{Transport: httpauth.Transport(id, sdk.Service("orders"))}}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /call", f.call)
	mux.HandleFunc("GET /feed", f.feed)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ready := map[string]string{"address": lis.Addr().String(), "spiffe_id": id.ID().String()}
	if err := json.NewEncoder(os.Stdout).Encode(ready); err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { srv.Close() })
	if err := srv.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// front carries the plain requests of the show to orders.
type front struct {
	id     *sdk.Identity
	orders string
	client *http.Client
}

// outcome is what a call came to.
type outcome struct {
	Status     int    `json:"status"`
	Body       string `json:"body,omitempty"`
	Server     string `json:"server,omitempty"`
	Serial     string `json:"serial,omitempty"`
	Error      string `json:"error,omitempty"`
	Reason     string `json:"reason,omitempty"`
	DecisionID string `json:"decision_id,omitempty"`
}

// call makes one call of orders and says what it came to.
func (f *front) call(w http.ResponseWriter, r *http.Request) {
	out := f.try(r.Context(), r.URL.Query().Get("method"), r.URL.Query().Get("path"))
	if own, err := f.id.GetX509SVID(); err == nil {
		out.Serial = own.Certificates[0].SerialNumber.Text(16)
	}
	_ = json.NewEncoder(w).Encode(out) // the show has gone away: nobody to tell
}

func (f *front) try(ctx context.Context, method, path string) outcome {
	resp, err := f.send(ctx, method, path)
	if denied, ok := errors.AsType[*sdk.DeniedError](err); ok {
		return outcome{Error: denied.Error(), Reason: string(denied.Reason), DecisionID: denied.DecisionID}
	}
	if err != nil {
		return outcome{Error: err.Error()}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return outcome{Error: err.Error()}
	}
	return outcome{Status: resp.StatusCode, Body: string(body), Server: resp.TLS.PeerCertificates[0].URIs[0].String()}
}

func (f *front) send(ctx context.Context, method, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, f.orders+path, nil)
	if err != nil {
		return nil, err
	}
	return f.client.Do(req)
}

// feed passes the endless feed of orders on, until it is cut.
func (f *front) feed(w http.ResponseWriter, r *http.Request) {
	resp, err := f.send(r.Context(), http.MethodGet, "/feed")
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	buf := make([]byte, 1024)
	for {
		n, err := resp.Body.Read(buf)
		if _, werr := w.Write(buf[:n]); werr != nil || http.NewResponseController(w).Flush() != nil || err != nil {
			return
		}
	}
}

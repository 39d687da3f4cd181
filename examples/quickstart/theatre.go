// The stage of the quickstart: its processes, and how calls are made.

package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os/exec"
	"time"

	"merlon.dev/examples/internal/procs"
)

// theatre holds the processes of one run. It is used by one goroutine.
type theatre struct {
	*procs.Procs
	started time.Time
	web     string // URL of the web service's plain front
}

// open builds the three binaries.
func open(ctx context.Context) (*theatre, error) {
	p, err := procs.Build(ctx, "quickstart", "./ca/cmd/merlon", "./examples/quickstart/orders", "./examples/quickstart/web")
	if err != nil {
		return nil, err
	}
	return &theatre{Procs: p, started: time.Now()}, nil
}

// serve starts one of the services, and decodes what it says once it is ready.
func (t *theatre) serve(ctx context.Context, ready any, name string, args ...string) error {
	return t.StartReady(ctx, ready, name, exec.Command(t.Bin(name), args...))
}

// outcome is what the web service says of one call that it made.
type outcome struct {
	Status     int    `json:"status"`
	Body       string `json:"body"`
	Server     string `json:"server"` // SPIFFE ID that the server proved
	Serial     string `json:"serial"` // of web's own X509-SVID
	Error      string `json:"error"`
	Reason     string `json:"reason"`
	DecisionID string `json:"decision_id"`
}

// call has the web service call orders.
func (t *theatre) call(ctx context.Context, method, path string) (outcome, error) {
	var out outcome
	resp, err := t.ask(ctx, "/call?method="+method+"&path="+path)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

// ask sends a GET to the web service's plain front.
func (t *theatre) ask(ctx context.Context, pathAndQuery string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.web+pathAndQuery, nil)
	if err != nil {
		return nil, err
	}
	return (&http.Client{}).Do(req)
}

// firstByte waits until a stream has begun.
func firstByte(r io.Reader) error {
	_, err := io.ReadFull(r, make([]byte, 1))
	return err
}

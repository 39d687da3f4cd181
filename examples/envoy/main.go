// Command envoy shows two services that know nothing of identities, web and orders,
// made mutual-TLS and policy-checked by two Envoys: it starts `merlon dev`, both Envoys
// with web.yaml and orders.yaml, and a plain HTTP server as orders, and makes the calls
// of web. It exits 0 only if each came out as it should. With -hold it stays, for calls
// of your own.
//
//	go run ./examples/envoy
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	hold := flag.Bool("hold", false, "stay, for calls of your own")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *hold)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "envoy: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, hold bool) error {
	s, err := open(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.start(ctx); err != nil {
		return err
	}
	for _, act := range []struct {
		title string
		play  func(context.Context, *setup) error
	}{
		{"an allowed call, with a forged identity in it", allowed},
		{"a denied call explains itself", denied},
		{"a path that servers read differently", ambiguous},
		{"a caller without an identity", stranger},
	} {
		fmt.Printf("\n== %s\n", act.title)
		if err := act.play(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", act.title, err)
		}
	}
	fmt.Println("\nEverything was seen.")
	if hold {
		fmt.Printf("As web: curl -i http://%s/orders/1\nCtrl-C ends it.\n", s.address("8001"))
		<-ctx.Done()
	}
	return nil
}

// call makes a call of web, which is to its own Envoy, in plain text.
func call(ctx context.Context, s *setup, method, path, forged string) (status int, header http.Header, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.address("8001"), nil)
	if err != nil {
		return 0, nil, "", err
	}
	req.URL.Opaque = path // as it is
	if forged != "" {
		req.Header.Set("X-Spiffe-Id", forged)
	}
	resp, err := (&http.Client{Timeout: 10 * time.Second}).Do(req)
	if err != nil {
		return 0, nil, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	fmt.Printf("web: %s %s → %d %s\n", method, path, resp.StatusCode, strings.TrimSpace(string(text)))
	return resp.StatusCode, resp.Header, string(text), err
}

func allowed(ctx context.Context, s *setup) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		status, _, body, err := call(ctx, s, http.MethodGet, "/orders/1", "spiffe://shop.test/admin")
		if err == nil && status == http.StatusOK {
			if !strings.Contains(body, "for spiffe://shop.test/web") {
				return fmt.Errorf("orders took the caller for another: %q", body)
			}
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("status %d, %w", status, err)
		}
		time.Sleep(200 * time.Millisecond) // the Envoys are fetching their secrets
	}
}

func denied(ctx context.Context, s *setup) error {
	status, _, body, err := call(ctx, s, http.MethodPost, "/orders/1", "")
	if err != nil {
		return err
	}
	var problem struct {
		Reason     string `json:"reason"`
		DecisionID string `json:"decision_id"`
	}
	if err := json.Unmarshal([]byte(body), &problem); err != nil {
		return err
	}
	if status != http.StatusForbidden || problem.Reason != "METHOD" {
		return fmt.Errorf("status %d, reason %s; want 403 METHOD", status, problem.Reason)
	}
	why, err := s.Merlon(ctx, "explain", "decision", problem.DecisionID)
	fmt.Print(why)
	return err
}

func ambiguous(ctx context.Context, s *setup) error {
	status, _, _, err := call(ctx, s, http.MethodGet, "/orders/%2e%2e/admin", "")
	if err == nil && status != http.StatusBadRequest {
		err = fmt.Errorf("status %d; want 400", status)
	}
	return err
}

func stranger(ctx context.Context, s *setup) error {
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // it is about what orders' Envoy takes
	conn, err := dialer.DialContext(ctx, "tcp", s.address("8443"))
	if err == nil {
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1)) // in TLS 1.3 the client learns only here that it was refused
	}
	if err == nil || !strings.Contains(err.Error(), "certificate required") {
		return fmt.Errorf("%w; want a refusal", errors.Join(err, errors.New("a caller without a certificate was let in")))
	}
	fmt.Println("orders' Envoy:", err)
	return nil
}

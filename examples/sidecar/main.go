// Command sidecar shows two programs that know nothing of identities, nginx as the
// service orders and curl as its client web, made mutual-TLS and policy-checked by two
// sidecars. It starts `merlon dev`, the sidecars, and nginx by one of them, and calls
// with curl. It exits 0 only if each call came out as it should. With -hold it stays,
// for calls of your own.
//
//	go run ./examples/sidecar
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
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
		fmt.Fprintln(os.Stderr, "sidecar: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, hold bool) error {
	s, err := open(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.start(ctx); err != nil {
		return err
	}
	acts := []struct {
		title string
		play  func(context.Context, *setup) error
	}{
		{"an allowed call, with a forged identity in it", allowed},
		{"a denied call explains itself", denied},
		{"a path that servers read differently", ambiguous},
		{"a caller without an identity", stranger},
		{"the registration entry of web is deleted", deleted},
	}
	if hold { // web is still needed
		acts = acts[:len(acts)-1]
	}
	for _, act := range acts {
		fmt.Printf("\n== %s\n", act.title)
		if err := act.play(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", act.title, err)
		}
	}
	fmt.Println("\nEverything was seen.")
	if hold {
		fmt.Printf("As web: curl -i http://%s/orders/1\nCtrl-C ends it.\n", s.web)
		<-ctx.Done()
	}
	return nil
}

// curl runs the one from Debian, and returns what it printed: the status and the body.
func curl(ctx context.Context, args ...string) (string, error) {
	fmt.Println("$ curl", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, "curl", append([]string{"-sS", "--max-time", "20", "-w", "%{http_code}\n"}, args...)...)
	out, err := cmd.CombinedOutput()
	fmt.Print(string(out))
	return string(out), err
}

func allowed(ctx context.Context, s *setup) error {
	out, err := curl(ctx, "-H", "x-spiffe-id: spiffe://shop.test/admin", "http://"+s.web+"/orders/1")
	if err == nil && !strings.HasSuffix(out, "for spiffe://shop.test/web\n200\n") {
		err = fmt.Errorf("%q; want an answer for web", out)
	}
	return err
}

func denied(ctx context.Context, s *setup) error {
	out, err := curl(ctx, "-X", "POST", "http://"+s.web+"/orders/1")
	if err != nil {
		return err
	}
	text, status, _ := strings.Cut(out, "}")
	var problem struct {
		Reason     string `json:"reason"`
		DecisionID string `json:"decision_id"`
	}
	if err := json.Unmarshal([]byte(text+"}"), &problem); err != nil {
		return err
	}
	if strings.TrimSpace(status) != "403" || problem.Reason != "METHOD" {
		return fmt.Errorf("status %s, reason %s; want 403 METHOD", status, problem.Reason)
	}
	why, err := s.Merlon(ctx, "explain", "decision", problem.DecisionID)
	fmt.Print(why)
	return err
}

func ambiguous(ctx context.Context, s *setup) error {
	out, err := curl(ctx, "--path-as-is", "http://"+s.web+"/orders/%2e%2e/admin")
	if err == nil && !strings.HasSuffix(out, "400\n") {
		err = fmt.Errorf("%q; want 400", out)
	}
	return err
}

func stranger(ctx context.Context, s *setup) error {
	if out, err := curl(ctx, "-k", "https://"+s.orders+"/orders/1"); err == nil {
		return fmt.Errorf("a caller without a certificate was let in: %q", out)
	}
	return nil
}

func deleted(ctx context.Context, s *setup) error {
	list, err := s.Merlon(ctx, "entry", "list", "--spiffe-id", "spiffe://shop.test/web", "-o", "json")
	if err != nil {
		return err
	}
	var entries []struct {
		EntryID string `json:"entry_id"`
	}
	if err := json.Unmarshal([]byte(list), &entries); err != nil || len(entries) != 1 {
		return fmt.Errorf("the entries of web: %s, %v", list, err)
	}
	if _, err := s.Merlon(ctx, "entry", "delete", entries[0].EntryID); err != nil {
		return err
	}
	// web's sidecar has no identity any more, and those that it had are revoked.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out, err := curl(ctx, "http://"+s.web+"/orders/1")
		if err == nil && strings.HasSuffix(out, "503\n") {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("web is still served: %q, %v", out, err)
		}
	}
}

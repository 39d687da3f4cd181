// Command quickstart shows Merlon's main job on real processes: it starts
// `merlon dev` and two services, orders and web, and walks through an allowed
// call, a denied call that explains itself, a policy change that takes effect
// live, a revocation that cuts an open stream, and an SVID rotation under
// calls. It exits 0 only if it has seen each of them. `make demo` runs it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "quickstart: error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // the first build included
	defer cancel()
	t, err := open(ctx)
	if err != nil {
		return err
	}
	defer t.Close()
	for _, act := range []struct {
		title string
		play  func(context.Context, *theatre) error
	}{
		{"a trust domain, two services, their identities", startEverything},
		{"an allowed call", allowedCall},
		{"a denied call explains itself", deniedCall},
		{"the policy changes, live", policyChange},
		{"a revocation cuts an open stream", revocation},
		{"SVIDs rotate under calls", rotation},
	} {
		fmt.Printf("\n== %s\n", act.title)
		if err := act.play(ctx, t); err != nil {
			return fmt.Errorf("%s: %w", act.title, err)
		}
	}
	fmt.Printf("\nEverything was seen. It took %.1f s after the build.\n", time.Since(t.started).Seconds())
	return nil
}

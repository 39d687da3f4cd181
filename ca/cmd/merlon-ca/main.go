// Command merlon-ca is the certificate authority of a trust domain. It exits
// with 0 after a clean stop, 1 after a failure and 2 for settings that make no
// sense.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"merlon.dev/ca"
)

func main() { os.Exit(main1()) }

func main1() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return ca.Main(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
}

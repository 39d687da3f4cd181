// Command merlon-ca-full is merlon-ca, to which build tags add what speaks to the
// services of others: awskms, cloudkms, azurekms (keys) and stepcas, vaultcas,
// cloudcas (upstream authorities). It is a Go module of its own, so that their
// many dependencies are not those of Merlon.
//
//	go build -C ca/cmd/merlon-ca-full -tags stepcas,awskms -o merlon-ca
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

// Command merlon-sidecar gives an unmodified program an identity, mutual TLS and
// policy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"merlon.dev/sdk/coredump"
	"merlon.dev/sdk/sidecar"
)

func main() { os.Exit(main1()) }

func main1() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == "capture" {
		return capture(ctx, os.Args[2:])
	}
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	stayingSmall(ctx)
	cl, err := sidecar.ParseCommandLine(os.Args[1:], os.Getenv, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return complain(err, 2)
	}
	if err := coredump.Limit(); err != nil {
		return complain(err, 1)
	}
	err = cl.Run(ctx, os.Stdout, hangups)
	if exit, ok := errors.AsType[*sidecar.ExitError](err); ok {
		return complain(err, exit.Code)
	}
	if err != nil {
		return complain(err, 1)
	}
	return 0
}

// capture exits with 3 where something should be in force and is not.
func capture(ctx context.Context, args []string) int {
	err := sidecar.RunCapture(ctx, args, os.Stdout, os.Stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	switch {
	case sidecar.IsUsage(err):
		return complain(err, 2)
	case errors.Is(err, sidecar.ErrNotInForce):
		return complain(err, 3)
	}
	return complain(err, 1)
}

func complain(err error, code int) int {
	fmt.Fprintln(os.Stderr, "merlon-sidecar: error:", err)
	if hint := sidecar.Hint(err); hint != "" {
		fmt.Fprintln(os.Stderr, "hint:", hint)
	}
	return code
}

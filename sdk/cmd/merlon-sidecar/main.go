// Command merlon-sidecar gives an unmodified program an identity, mutual TLS and
// policy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"merlon.dev/sdk/sidecar"
)

// gcPercent keeps the sidecar small: it shares its node with those it serves. GOGC
// overrides it.
const gcPercent = 50

func main() { os.Exit(main1()) }

func main1() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == "capture" {
		return capture(ctx, os.Args[2:])
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	cl, err := sidecar.ParseCommandLine(os.Args[1:], os.Getenv, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		complain(err)
		return 2
	}
	if err := run(ctx, cl, os.Stdout); err != nil {
		complain(err)
		return 1
	}
	return 0
}

// capture exits with 3 where something should be in force and is not.
func capture(ctx context.Context, args []string) int {
	err := sidecar.RunCapture(ctx, args, os.Stdout, os.Stderr)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	complain(err)
	switch {
	case sidecar.IsUsage(err):
		return 2
	case errors.Is(err, sidecar.ErrNotInForce):
		return 3
	}
	return 1
}

func run(ctx context.Context, cl *sidecar.CommandLine, out io.Writer) error {
	if cl.ValidateOnly {
		_, err := fmt.Fprintln(out, "the settings are valid")
		return err
	}
	s, err := sidecar.New(cl.Config)
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

func complain(err error) {
	fmt.Fprintln(os.Stderr, "merlon-sidecar: error:", err)
	if hint := sidecar.Hint(err); hint != "" {
		fmt.Fprintln(os.Stderr, "hint:", hint)
	}
}

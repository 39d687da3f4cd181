// Command merlon-ca is the certificate authority of a trust domain. It exits
// with 0 after a clean stop, 1 after a failure and 2 for settings that make no
// sense.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"merlon.dev/ca"
)

func main() { os.Exit(main1()) }

func main1() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cl, err := ca.ParseCommandLine(os.Args[1:], os.Getenv, os.Stderr)
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

func run(ctx context.Context, cl *ca.CommandLine, out io.Writer) error {
	if cl.ValidateOnly {
		_, err := fmt.Fprintln(out, "the settings are valid")
		return err
	}
	log, err := cl.Config.NewLogger(os.Stderr)
	if err != nil {
		return err
	}
	cl.Config.Logger = log
	s, err := ca.New(cl.Config)
	if err != nil {
		return err
	}
	return s.Run(ctx)
}

func complain(err error) {
	fmt.Fprintln(os.Stderr, "merlon-ca: error:", err)
	if hint := ca.Hint(err); hint != "" {
		fmt.Fprintln(os.Stderr, "hint:", hint)
	}
}

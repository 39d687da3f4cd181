// Command merlon-agent is the agent of one node: it proves the node to the CA
// and serves the SPIFFE Workload API to the processes on it.
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

	"merlon.dev/agent"
	"merlon.dev/sdk/coredump"
)

// gcPercent keeps the agent small: what it holds lives long, it has little to
// collect, and it shares its node with those it serves. GOGC overrides it.
const gcPercent = 50

func main() { os.Exit(main1()) }

func main1() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	cl, err := agent.ParseCommandLine(os.Args[1:], os.Getenv, os.Stderr)
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

func run(ctx context.Context, cl *agent.CommandLine, out io.Writer) error {
	if cl.ValidateOnly {
		_, err := fmt.Fprintln(out, "the settings are valid")
		return err
	}
	if err := coredump.Forbid(); err != nil {
		return err
	}
	cl.Config.Supervised = true
	a, err := agent.New(cl.Config)
	if err != nil {
		return err
	}
	return a.Run(ctx)
}

func complain(err error) {
	fmt.Fprintln(os.Stderr, "merlon-agent: error:", err)
	if hint := agent.Hint(err); hint != "" {
		fmt.Fprintln(os.Stderr, "hint:", hint)
	}
}

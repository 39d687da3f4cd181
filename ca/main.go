// What every binary of the CA does: read the command line, serve, complain.

package ca

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

	"merlon.dev/ca/internal/config"
	"merlon.dev/sdk/coredump"
	"merlon.dev/sdk/systemd"
)

// Main runs the CA as args, without the program's name, and the environment say,
// until ctx ends. It returns the exit status: 0 after a clean stop, 1 after a
// failure, 2 for settings that make no sense.
func Main(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	cl, err := config.ParseCommandLine(args, getenv, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		complain(stderr, err)
		return 2
	}
	if err := run(ctx, cl, stdout, stderr); err != nil {
		complain(stderr, err)
		return 1
	}
	return 0
}

func run(ctx context.Context, cl *config.CommandLine, stdout, stderr io.Writer) error {
	if cl.ValidateOnly {
		_, err := fmt.Fprintln(stdout, "the settings are valid")
		return err
	}
	log, err := cl.Config.NewLogger(stderr)
	if err != nil {
		return err
	}
	cl.Config.Logger = log
	if err := coredump.Forbid(); err != nil {
		return err
	}
	s, err := New(cl.Config)
	if err != nil {
		return err
	}
	manager, err := systemd.Open(log)
	if err != nil {
		return err
	}
	return s.runUnder(ctx, manager)
}

func complain(w io.Writer, err error) {
	fmt.Fprintln(w, "merlon-ca: error:", err)
	if hint := Hint(err); hint != "" {
		fmt.Fprintln(w, "hint:", hint)
	}
}

// Command merlon is the operator's tool: it speaks to a CA and to an agent
// over their admin sockets, works on policy folders, and with `merlon dev`
// runs a whole trust domain in one process. One file per noun.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The exit codes; scripts rely on them.
const (
	exitOK        = 0
	exitFailure   = 1
	exitUsage     = 2
	exitUnhealthy = 3
	exitDenied    = 4
	exitWaits     = 5 // not done: it waits for a second administrator
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root, checkText(args)
	if err == nil {
		cmd, err = root.ExecuteContextC(ctx)
	}
	if err == nil {
		return exitOK
	}
	code, message, hint := describe(err)
	if p, _ := waiting(err); p != nil {
		if printErr := printProposal(stdout, cmd.Flag("output").Value.String(), p); printErr != nil {
			message += "; " + printErr.Error()
		}
	}
	if hint == "" && status.Code(err) == codes.InvalidArgument {
		hint = argumentHint(cmd, err)
	}
	if message != "" {
		fmt.Fprintln(stderr, "merlon: error:", message)
	}
	if hint != "" {
		fmt.Fprintln(stderr, "hint:", hint)
	}
	return code
}

func rootCommand() *cobra.Command {
	var o options
	root := &cobra.Command{
		Use:   "merlon",
		Short: "Give every process a short-lived identity and refuse every call that no policy allows",
		Long: `Merlon gives every process a short-lived identity and refuses every call that
no policy allows. This command speaks to a running CA or agent over its admin
socket (--admin or MERLON_ADMIN), or to a CA over the network (--ca) with an
SVID or an OIDC token; "merlon dev" starts both in one process.`,
		Example: `  merlon dev
  merlon entry create --spiffe-id spiffe://dev.local/web --selector unix:path:/usr/bin/web
  merlon policy push ./policy`,
		SilenceErrors: true,
		SilenceUsage:  true,
		// A noun alone shows its verbs; a wrong one is a mistake.
		Args: unknownCommand,
		RunE: showHelp,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	o.register(root)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{err.Error(), cmd.CommandPath() + " -h shows every flag and an example"}
	})
	root.AddCommand(
		entryCommand(&o), tokenCommand(&o), agentCommand(&o), trustCommand(&o), federationCommand(&o),
		revokeCommand(&o), revocationCommand(&o), policyNoun(&o), explainCommand(&o), doctorCommand(&o),
		storeCommand(&o), logCommand(&o), keyCommand(&o), replicaCommand(&o), authorityCommand(&o), approvalCommand(&o), migrateCommand(&o), devCommand(&o),
	)
	checkArgs(root)
	return root
}

// noun is a command that only groups verbs.
func noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: unknownCommand, RunE: showHelp}
	cmd.AddCommand(verbs...)
	if len(verbs) > 0 {
		cmd.Example = verbs[0].Example
	}
	return cmd
}

func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// unknownCommand refuses arguments of a noun, which are misspelt verbs.
func unknownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	message := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return usageError{message, "did you mean: " + cmd.CommandPath() + " " + strings.Join(near, " | ") + "?"}
	}
	return usageError{message, cmd.CommandPath() + " -h lists the commands"}
}

// hintError is a failure with the next thing to type.
type hintError struct {
	err  error
	hint string
}

func (e hintError) Error() string { return e.err.Error() }
func (e hintError) Unwrap() error { return e.err }

// silentError ends the command with code; everything has been said already.
type silentError struct{ code int }

func (e silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// describe turns an error into an exit code, a message and a hint.
func describe(err error) (code int, message, hint string) {
	if e, ok := errors.AsType[silentError](err); ok {
		return e.code, "", ""
	}
	if p, message := waiting(err); p != nil {
		return exitWaits, message, "another administrator reads it by `merlon approval list` and grants it: merlon approval grant " + p.GetProposalId()
	}
	if e, ok := errors.AsType[usageError](err); ok {
		return exitUsage, e.message, e.hint
	}
	if e, ok := errors.AsType[hintError](err); ok {
		code, message, _ = describe(e.err)
		return code, message, e.hint
	}
	st, ok := status.FromError(err)
	if !ok {
		return exitFailure, err.Error(), ""
	}
	hint = hintOfRefusal(st)
	switch st.Code() {
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied, st.Message(), cmp.Or(hint, "use the admin socket as root or as the service's user, or with --ca an SVID or a token that has the role")
	case codes.InvalidArgument: // what only the CA can judge
		return exitUsage, st.Message(), hint
	default:
		return exitFailure, st.Message(), hint
	}
}

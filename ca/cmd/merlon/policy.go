// merlon policy: the verbs that work on a folder and need no CA.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"merlon.dev/policy"
	"merlon.dev/policy/bundle"
	"merlon.dev/policy/diff"
	"merlon.dev/policy/engine"
	"merlon.dev/policy/engine/residual"
)

func policyCommand(o *options) *cobra.Command {
	return noun("policy", "Check, test, build and push the policy that decides every call",
		policyCheck(o), policyTest(o), policyBuild(), policyEval(), policySchema(), policyExplain(o), policyDiff(o), policyReplay(o))
}

// policyFolder reads a policy folder; what is wrong in it is reported with a
// hint where to look.
func policyFolder(dir string) (*bundle.Folder, error) { return fromFolder(dir, bundle.ReadFolder) }

// buildFolder makes the unsigned policy bundle of a policy folder.
func buildFolder(dir string) ([]byte, error) { return fromFolder(dir, bundle.Build) }

func fromFolder[T any](dir string, read func(string) (T, error)) (T, error) {
	var none T
	if err := checkFolder(dir, "give the folder that has the grants (*.yaml) and Rego (*.rego)"); err != nil {
		return none, err
	}
	result, err := read(dir)
	if err != nil {
		return none, hintError{err, "correct it and run merlon policy check " + dir + " again; the policy in force is unchanged"}
	}
	return result, nil
}

// loadFolder compiles the policy in dir as the enforcement points do.
func loadFolder(ctx context.Context, dir string) (*bundle.Folder, *engine.Engine, error) {
	f, err := policyFolder(dir)
	if err != nil {
		return nil, nil, err
	}
	e, err := engine.New(ctx, source(f))
	return f, e, err
}

func source(f *bundle.Folder) engine.Source {
	c := f.Contents()
	return engine.Source{Modules: c.Modules, Grants: c.Grants}
}

// checkedJSON is `merlon policy check -o json`.
type checkedJSON struct {
	Grants       int            `json:"grants"`
	Modules      int            `json:"modules"`
	BundleBytes  int            `json:"bundle_bytes"`
	Destinations []compiledJSON `json:"destinations"`
}

// compiledJSON says what decides the calls of one destination: "native" or "opa",
// and then why.
type compiledJSON struct {
	Destination  string `json:"destination"`
	Engine       string `json:"engine"`
	ProgramBytes int    `json:"program_bytes,omitempty"`
	Reason       string `json:"reason,omitempty"`
	// Kept says whether OPA's answers are kept for calls that agree in all that
	// the policy can read; NotKept says why not.
	Kept    bool   `json:"answers_kept,omitempty"`
	NotKept string `json:"not_kept,omitempty"`
}

// anyOther stands for the destinations that no grant names alone.
const anyOther = diff.Elsewhere

// compiledFor compiles the policy for each of destinations.
func compiledFor(ctx context.Context, e *engine.Engine, destinations []string) []compiledJSON {
	rows := make([]compiledJSON, 0, len(destinations))
	for _, d := range destinations {
		row := compiledJSON{Destination: d, Engine: "native"}
		encoded, err := e.Encoded(ctx, d)
		if row.ProgramBytes = len(encoded); err != nil {
			row.Engine, row.Reason = "opa", err.Error()
			if err := e.Kept(); err != nil {
				row.NotKept = err.Error()
			}
			row.Kept = row.NotKept == ""
		}
		if d == anyOther {
			row.Destination = "any other"
		}
		rows = append(rows, row)
	}
	return rows
}

func policyCheck(o *options) *cobra.Command {
	var destinations []string
	cmd := &cobra.Command{
		Use:   "check FOLDER",
		Short: "Say whether a policy folder is well formed, and what will decide by it",
		Long: `Say whether a policy folder is well formed, and where not; and for each
destination that its grants name what decides the calls that arrive there:
"native", the compiled form, in about 100 ns, or "opa", evaluation, in about
30 µs, and then why the policy has no compiled form for it, and whether OPA's
answers can be kept for the next call that the policy cannot tell from this one.`,
		Example: `  merlon policy check ./policy
  merlon policy check ./policy --destination spiffe://shop.test/orders`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, e, err := loadFolder(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			raw, err := bundle.Build(args[0])
			if err != nil {
				return err
			}
			if destinations == nil {
				destinations = append(e.Destinations(), anyOther)
			}
			rows := compiledFor(cmd.Context(), e, destinations)
			if o.output == "json" {
				return printJSON(cmd.OutOrStdout(), checkedJSON{len(f.Grants), len(f.Modules), len(raw), rows})
			}
			return printChecked(cmd.OutOrStdout(), f, len(raw), rows)
		},
	}
	cmd.Flags().StringArrayVar(&destinations, "destination", nil, "ask for this SPIFFE ID instead of those that grants name; can be repeated")
	return cmd
}

func printChecked(w io.Writer, f *bundle.Folder, size int, rows []compiledJSON) error {
	fmt.Fprintf(w, "ok: grants: %d, Rego modules: %d, bytes as a bundle: %d\n", len(f.Grants), len(f.Modules), size)
	native := 0
	for _, row := range rows {
		if row.Engine == "native" {
			native++
			continue
		}
		kept := "its answers are kept for calls that the policy cannot tell apart"
		if !row.Kept {
			kept = "evaluated for each call, because " + row.NotKept
		}
		fmt.Fprintf(w, "%s: decided by opa, because %s; %s\n", row.Destination, row.Reason, kept)
	}
	_, err := fmt.Fprintf(w, "compiled to native programs: %d of %d destinations\n", native, len(rows))
	return err
}

func policyBuild() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:     "build FOLDER --file FILE",
		Short:   "Build the unsigned policy bundle of a folder, to be sent to a CA elsewhere",
		Example: `  merlon policy build ./policy --file bundle.tar.gz`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" {
				return usageError{"no file to write to", "merlon policy build " + args[0] + " --file bundle.tar.gz"}
			}
			if _, err := policyFolder(args[0]); err != nil {
				return err
			}
			raw, err := bundle.Build(args[0])
			if err != nil {
				return err
			}
			if file == "-" {
				_, err = cmd.OutOrStdout().Write(raw)
				return err
			}
			return os.WriteFile(file, raw, 0o644) //nolint:gosec // a policy bundle is no secret
		},
	}
	cmd.Flags().StringVar(&file, "file", "", `file to write; "-" is standard output`)
	return cmd
}

func policyEval() *cobra.Command {
	var engineName string
	cmd := &cobra.Command{
		Use:   "eval FOLDER",
		Short: "Decide calls given as JSON lines on standard input, one answer per line",
		Long: `Decide calls by the policy in FOLDER. Each line of standard input is one call,
in the short form of the example or in the shape of opa-envoy-plugin's input;
each line of standard output is its answer. A line that cannot be read is
answered with reason ERROR, and the exit code is then 1; denials alone are no
failure.

The answers do not depend on the engine: auto takes the compiled form of the
policy where there is one for the call's destination, and OPA else; native fails
where there is none; opa never takes it.`,
		Example: `  echo '{"source":"spiffe://shop.test/web","destination":"spiffe://shop.test/orders","protocol":"http","method":"GET","path":"/orders/1"}' |
    merlon policy eval ./policy`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			by, known := evaluators[engineName]
			if !known {
				return usageError{fmt.Sprintf("unknown engine %q", engineName), "use --engine auto, native or opa"}
			}
			_, e, err := loadFolder(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return evalLines(cmd.Context(), e, by, cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&engineName, "engine", "auto", "what evaluates: auto, native or opa")
	return cmd
}

// evalLines answers each line of in on out, and says on errs which were bad.
func evalLines(ctx context.Context, e *engine.Engine, by evaluator, in io.Reader, out, errs io.Writer) error {
	lines, answers := bufio.NewReaderSize(in, 64<<10), bufio.NewWriter(out)
	bad, number := 0, 0
	for ctx.Err() == nil {
		line, err := readLine(lines)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read calls: %v", err)
		}
		if number++; len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		answer, err := evalLine(ctx, e, by, line)
		if why := (*residual.NotNative)(nil); errors.As(err, &why) {
			return hintError{fmt.Errorf("line %d: the policy has no compiled form for this destination: %w", number, err), "use --engine auto or --engine opa: the answers are the same"}
		}
		if err != nil {
			bad++
			fmt.Fprintf(errs, "line %d: %v\n", number, err)
		}
		if err := json.NewEncoder(answers).Encode(answer); err != nil {
			return fmt.Errorf("write answers: %v", err)
		}
		if lines.Buffered() == 0 { // somebody may be waiting for this answer
			if err := answers.Flush(); err != nil {
				return fmt.Errorf("write answers: %v", err)
			}
		}
	}
	if err := answers.Flush(); err != nil {
		return fmt.Errorf("write answers: %v", err)
	}
	if bad > 0 {
		return hintError{fmt.Errorf("%d of %d lines could not be read", bad, number), "merlon policy eval -h shows the form of a line"}
	}
	return ctx.Err()
}

// evaluator decides one call and names what decided.
type evaluator func(ctx context.Context, e *engine.Engine, in *policy.Input) (policy.Answer, error)

// evaluators are the values of --engine.
var evaluators = map[string]evaluator{
	"opa": func(ctx context.Context, e *engine.Engine, in *policy.Input) (policy.Answer, error) {
		return e.AuthorizeByOPA(ctx, in).Answer("opa"), nil
	},
	"native": func(ctx context.Context, e *engine.Engine, in *policy.Input) (policy.Answer, error) {
		if _, err := e.Program(ctx, in.Destination); err != nil {
			return policy.Answer{}, err
		}
		return e.Authorize(ctx, in).Answer("native"), nil
	},
	"auto": func(ctx context.Context, e *engine.Engine, in *policy.Input) (policy.Answer, error) {
		by := "native"
		if _, err := e.Program(ctx, in.Destination); err != nil {
			by = "opa"
		}
		return e.Authorize(ctx, in).Answer(by), nil
	},
}

func evalLine(ctx context.Context, e *engine.Engine, by evaluator, line []byte) (policy.Answer, error) {
	in, err := policy.ParseInput(line)
	if err != nil {
		return policy.Decision{Reason: policy.Error}.Answer("opa"), err
	}
	return by(ctx, e, in)
}

// readLine returns the next line without its end. Of a line that is longer
// than any input may be it returns as much as shows that.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if room := policy.MaxInputBytes + 2 - len(line); room > 0 {
			line = append(line, part[:min(len(part), room)]...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(line) > 0, err == nil:
			for len(line) > 0 && (line[len(line)-1] == '\n' || line[len(line)-1] == '\r') {
				line = line[:len(line)-1]
			}
			return line, nil
		default:
			return nil, err
		}
	}
}

// The command line as scripts use it: testscript over the real binaries.

package integration_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"merlon.dev/integration/stage"
)

// Each script finds merlon, merlon-ca and merlon-agent on its PATH. The
// command `dev` starts a trust domain and sets MERLON_ADMIN,
// SPIFFE_ENDPOINT_SOCKET, HTTPS and CA_BUNDLE.
func TestScripts(t *testing.T) {
	bin := filepath.Dir(stage.Bin(t, "merlon"))
	testscript.Run(t, testscript.Params{
		Dir: filepath.Join("testdata", "script"),
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", bin+string(os.PathListSeparator)+os.Getenv("PATH"))
			env.Setenv("MERLON", filepath.Join(bin, "merlon"))
			env.Setenv("UID", strconv.Itoa(os.Getuid()))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"dev":      startDev,
			"exitcode": exitCode,
		},
		UpdateScripts: os.Getenv("UPDATE") != "",
	})
}

func startDev(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("dev cannot be negated")
	}
	var ready struct {
		WorkloadAPI string `json:"workload_api"`
		Admin       string `json:"admin"`
		HTTPS       string `json:"https"`
		CA          string `json:"ca"`
	}
	cmd := exec.Command(ts.Getenv("MERLON"), append([]string{"dev", "-o", "json"}, args...)...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	ts.Defer(func() {
		ts.Check(cmd.Process.Signal(os.Interrupt))
		ts.Check(cmd.Wait())
	})
	ts.Check(json.NewDecoder(stdout).Decode(&ready))
	ts.Setenv("MERLON_ADMIN", ready.Admin)
	ts.Setenv("SPIFFE_ENDPOINT_SOCKET", ready.WorkloadAPI)
	ts.Setenv("HTTPS", ready.HTTPS)
	ts.Setenv("CA_BUNDLE", ready.CA)
}

// exitCode runs a command and compares its exit code: exitcode 2 merlon entry.
func exitCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode CODE COMMAND…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, ok := err.(*exec.ExitError) //nolint:errorlint // straight from Run
		if !ok {
			ts.Fatalf("run %s: %v", args[1], err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code of %v = %d; want %d", args[1:], got, want)
	}
}

// What the kernel says of limits. That a crash leaves nothing is shown from outside
// (integration/attacks).

package coredump

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// inChild makes this program limit itself and start another one.
const inChild = "MERLON_TEST_COREDUMP"

func TestMain(m *testing.M) {
	if os.Getenv(inChild) == "" {
		m.Run()
		return
	}
	cmd := exec.Command("/bin/sh", "-c", "read line; ulimit -S -c; ulimit -H -c")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	stdin, err := cmd.StdinPipe()
	must(err)
	must(Limit())
	must(cmd.Start())
	must(Restore(cmd.Process.Pid))
	must(stdin.Close())
	must(cmd.Wait())
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// A program that is started gets the limit that there was.
func TestRestoreGivesTheLimitBack(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", `ulimit -S -c 8 && ulimit -H -c 16 && exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), inChild+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	if got := strings.Fields(string(out)); len(got) != 2 || got[0] != "8" || got[1] != "16" {
		t.Errorf("limits %q; want 8 and 16", got)
	}
}

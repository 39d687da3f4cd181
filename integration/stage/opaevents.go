// What OPA's own types make of events of a decision log.

package stage

import (
	"bytes"
	"os/exec"
	"sync"
	"testing"
)

var buildOPAEvents = sync.OnceValues(func() (string, error) { return buildModule("opaevents") })

// OPAEvents gives back lines as the types of OPA's decision-log plugin write them
// that have read them. The test fails where they do not read one.
func OPAEvents(tb testing.TB, lines []byte) []byte {
	tb.Helper()
	bin, err := buildOPAEvents()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(bin)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(lines), &out, &errs
	if err := cmd.Run(); err != nil {
		tb.Fatalf("%v\n%s", err, errs.String())
	}
	return out.Bytes()
}

// Clocks that jump: programs and tests are compiled with a package time whose Now adds
// a number of seconds, from some time after the start of the process on, or as the
// program itself says. Timers, and the clock that only runs, are as always. It takes
// minutes: everything is compiled anew.

package stage

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Where Now of Go 1.26 has the seconds of the wall clock.
const readsClock = "sec, nsec, mono := runtimeNow()\n"

// WithClock compiles merlon-ca or merlon-agent with a clock that jumps by off when
// the process has run for after, and returns the name under which Start finds it.
func WithClock(tb testing.TB, binary string, off, after time.Duration) (name string) {
	tb.Helper()
	dir, err := build()
	if err != nil {
		tb.Fatal(err)
	}
	name = fmt.Sprintf("%s-%+ds", binary, int(off.Seconds()))
	if exists(filepath.Join(dir, name)) {
		return name
	}
	overlay := clockOverlay(tb, filepath.Join(dir, name), fmt.Sprintf("\tif mono-startNano > %d {\n\t\tsec += %d\n\t}\n", after.Nanoseconds(), int(off.Seconds())), "")
	folder := map[string]string{"merlon-ca": "ca", "merlon-agent": "agent"}[binary]
	cmd := exec.Command("go", "build", "-overlay", overlay, "-o", filepath.Join(dir, name), "merlon.dev/"+folder+"/cmd/"+binary)
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return name
}

// TestWithJumps runs tests of a package of ours that call time.Jump(seconds), which
// sets the clock of their process that far off; their files have the build tag
// clockjump.
func TestWithJumps(tb testing.TB, pkg, run string) {
	tb.Helper()
	overlay := clockOverlay(tb, filepath.Join(tb.TempDir(), "jumps"), "\tsec += jumped.Load()\n",
		"\nvar jumped atomic.Int64\n\n// Jump sets the clock.\nfunc Jump(seconds int64) { jumped.Store(seconds) }\n")
	cmd := exec.Command("go", "test", "-count", "1", "-v", "-tags", "clockjump", "-overlay", overlay, "-run", run, "merlon.dev/"+pkg)
	out, err := cmd.CombinedOutput()
	tb.Logf("%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		tb.Errorf("tests of %s with jumping clocks: %v", pkg, err)
	}
}

// clockOverlay makes a file for go's -overlay, in which Now does more after it has read
// the clock, and package time has more declarations.
func clockOverlay(tb testing.TB, path, more, declarations string) string {
	tb.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		tb.Fatal(err)
	}
	original := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		tb.Fatal(err)
	}
	text := string(source)
	if strings.Count(text, "func Now() Time {\n\t"+readsClock) != 1 || strings.Count(text, "\nimport (\n") != 1 {
		tb.Fatalf("%s reads the clock in another way than Go 1.26", original)
	}
	text = strings.Replace(text, readsClock, readsClock+more, 1) + declarations
	if declarations != "" {
		text = strings.Replace(text, "\nimport (\n", "\nimport (\n\t\"sync/atomic\"\n", 1)
	}
	changed := path + ".time.go"
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{original: changed}})
	if err != nil {
		tb.Fatal(err)
	}
	for path, content := range map[string][]byte{changed: []byte(text), changed + ".json": overlay} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	return changed + ".json"
}

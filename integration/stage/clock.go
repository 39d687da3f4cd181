// Binaries whose clock jumps: package time is compiled with a Now that adds a number
// of seconds from some time after the start of the process on. Timers, and the clock
// that only runs, are as always. It takes minutes: everything is compiled anew.

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
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		tb.Fatal(err)
	}
	original := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		tb.Fatal(err)
	}
	if n := strings.Count(string(source), "func Now() Time {\n\t"+readsClock); n != 1 {
		tb.Fatalf("%s reads the clock in another way than Go 1.26", original)
	}
	changed := filepath.Join(dir, name+".time.go")
	jump := fmt.Sprintf("\tif mono-startNano > %d {\n\t\tsec += %d\n\t}\n", after.Nanoseconds(), int(off.Seconds()))
	text := strings.Replace(string(source), readsClock, readsClock+jump, 1)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{original: changed}})
	if err != nil {
		tb.Fatal(err)
	}
	for path, content := range map[string][]byte{changed: []byte(text), changed + ".json": overlay} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	folder := map[string]string{"merlon-ca": "ca", "merlon-agent": "agent"}[binary]
	cmd := exec.Command("go", "build", "-overlay", changed+".json", "-o", filepath.Join(dir, name), "merlon.dev/"+folder+"/cmd/"+binary)
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return name
}

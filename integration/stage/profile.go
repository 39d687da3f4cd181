// Profiles of the real binaries: where MERLON_PROFILES names a folder, they are built
// with one source file more (go build -overlay), which writes down where their CPU and
// memory went. The tree, and what is shipped, know nothing of it.

package stage

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// profilesEnv names the folder for profiles.
const profilesEnv = "MERLON_PROFILES"

// profiler is the source file: a process starts its profile as it starts itself, and
// ends it when it is told to.
//
//go:embed profile.go.txt
var profiler []byte

// profiled are the programs that can write profiles.
var profiled = map[string]string{
	"merlon": "ca/cmd/merlon", "merlon-ca": "ca/cmd/merlon-ca", "merlon-agent": "agent/cmd/merlon-agent", "merlon-sidecar": "sdk/cmd/merlon-sidecar",
}

// profilerOverlay are the arguments of go build with the profiler in each program; none
// without MERLON_PROFILES.
func profilerOverlay(root, dir string) ([]string, error) {
	if os.Getenv(profilesEnv) == "" {
		return nil, nil
	}
	source := filepath.Join(dir, "profiler.go")
	if err := os.WriteFile(source, profiler, 0o600); err != nil {
		return nil, err
	}
	replace := make(map[string]string)
	for _, folder := range profiled {
		replace[filepath.Join(root, folder, "zz_profiler.go")] = source
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return nil, err
	}
	overlay := filepath.Join(dir, "profiler.json")
	return []string{"-overlay", overlay}, os.WriteFile(overlay, text, 0o600)
}

// endProfile has the process write its profiles, and waits until it has.
func endProfile(tb testing.TB, name string, process *os.Process) {
	tb.Helper()
	dir := os.Getenv(profilesEnv)
	if _, ok := profiled[name]; !ok || dir == "" || process.Signal(syscall.SIGUSR1) != nil {
		return
	}
	done := filepath.Join(dir, fmt.Sprintf("%s-%d.done", name, process.Pid))
	for range 1000 {
		if exists(done) {
			return
		}
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", process.Pid)); err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return // it has ended by itself
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Errorf("%s wrote no profile into %s within 10 s", name, dir)
}

// Clocks that jump, of one process and not of the machine. Of a program that runs, by a
// number in its code (SetClock). Of tests that let their own clock jump, by a package
// time that can: everything is compiled anew for that, which takes minutes. Timers, and
// the clock that only runs, are as always, as they are where a machine's clock is set.

package stage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Where Now of Go 1.26 has the seconds of the wall clock.
const readsClock = "sec, nsec, mono := runtimeNow()\n"

// epoch is what time.Now of Go 1.26 adds to the seconds of the wall clock, in the form in
// which it is in the machine code.
var epoch = binary.LittleEndian.AppendUint32(nil, clockEpoch)

const clockEpoch = 62135596800 - 59453308800 // unixToInternal - minWall

// clocks are where in a program, by its path, that number is.
var clocks sync.Map

// SetClock lets the clock of a running program, by its process ID, be off by whole
// seconds from now on; with 0 it is right again. Nothing is compiled for it: while the
// process stands still, the number that time.Now adds is changed in its code. It needs
// root, as the process may hide from others, and fails where the code is not as expected.
func SetClock(tb testing.TB, pid int, off time.Duration) {
	tb.Helper()
	address, err := clockOf(pid)
	if err != nil {
		tb.Fatalf("set the clock of process %d: %v", pid, err)
	}
	number := binary.LittleEndian.AppendUint32(nil, uint32(clockEpoch+int64(off/time.Second)))
	if err := whileHalted(pid, func() error {
		memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer memory.Close()
		_, err = memory.WriteAt(number, address)
		return err
	}); err != nil {
		tb.Fatalf("set the clock of process %d: %v", pid, err)
	}
}

// clockOf is where the number is in the memory of a process.
func clockOf(pid int) (address int64, err error) {
	exe := fmt.Sprintf("/proc/%d/exe", pid)
	path, err := os.Readlink(exe)
	if err != nil {
		return 0, err
	}
	if known, ok := clocks.Load(path); ok {
		return known.(int64), nil
	}
	file, err := elf.Open(exe)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	if file.Machine != elf.EM_X86_64 || file.Type != elf.ET_EXEC {
		return 0, fmt.Errorf("%s is %v, %v; only a static program for x86-64 is understood", path, file.Machine, file.Type)
	}
	symbols, err := file.Symbols()
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(symbols, func(s elf.Symbol) bool { return s.Name == "time.Now" })
	text := file.Section(".text")
	if i < 0 || text == nil {
		return 0, fmt.Errorf("%s has no time.Now", path)
	}
	code := make([]byte, symbols[i].Size)
	if _, err := text.ReadAt(code, int64(symbols[i].Value-text.Addr)); err != nil {
		return 0, err
	}
	if bytes.Count(code, epoch) != 1 {
		return 0, fmt.Errorf("time.Now of %s is not as Go 1.26 compiles it", path)
	}
	address = int64(symbols[i].Value) + int64(bytes.Index(code, epoch))
	clocks.Store(path, address)
	return address, nil
}

// whileHalted does something while no thread of a process runs.
func whileHalted(pid int, do func() error) error {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	defer syscall.Kill(pid, syscall.SIGCONT)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		runs, err := running(pid)
		if err != nil {
			return err
		}
		if !runs {
			return do()
		}
		if time.Now().After(deadline) {
			return errors.New("it does not stop")
		}
	}
}

// running says whether any thread of a process is not stopped.
func running(pid int) (bool, error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		return false, errors.Join(err, errors.New("it has ended"))
	}
	for _, path := range threads {
		stat, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // the thread has ended
		}
		if err != nil {
			return false, err
		}
		if _, state, _ := bytes.Cut(stat, []byte(") ")); !bytes.HasPrefix(state, []byte("T")) {
			return true, nil
		}
	}
	return false, nil
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

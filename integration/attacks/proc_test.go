// T5: an agent started where /proc is something else than the kernel's: a folder that
// somebody laid out names users and programs as it likes.

package attacks_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

func TestAgentBelievesNoForgedProc(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := stage.Dir(t)
	forged := filepath.Join(dir, "proc", "1")
	if err := os.MkdirAll(forged, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(forged, "status"), []byte("Uid:\t0\t0\t0\t0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, mount := range map[string]string{
		"a new filesystem": "mount -t tmpfs none /proc",
		"a folder":         "mount --bind " + filepath.Dir(forged) + " /proc",
	} {
		t.Run(name, func(t *testing.T) {
			binary := stage.Bin(t, "merlon-agent")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // one that believes it serves for ever
			defer cancel()
			cmd := exec.CommandContext(ctx, "sh", "-c", mount+` && exec "$0" "$@"`, binary,
				"-trust-domain", "shop.test", "-ca-address", "127.0.0.1:1", "-health-address", "off", "-data-dir", filepath.Join(stage.Dir(t), "data"),
				"-admin-socket", filepath.Join(dir, "admin", "admin.sock"), "-public-socket", filepath.Join(dir, "public", "api.sock"))
			cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
			out, err := cmd.CombinedOutput()
			exit, ended := errors.AsType[*exec.ExitError](err)
			if !ended || exit.ExitCode() != 1 || !strings.Contains(string(out), "/proc is not the kernel's proc filesystem") {
				t.Errorf("merlon-agent: %v\n%s; want it to end, and why", err, out)
			}
		})
	}
}

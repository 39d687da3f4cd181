// T37: the memory of CA and agent is not for others, nor is a file that a crash leaves.

package attacks_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/integration/stage"
)

// asStranger starts a program as another user, in a folder of his with room for core
// images and with a Go runtime that asks for one when it crashes.
func asStranger(t *testing.T, dir, program string, args ...string) (cmd *exec.Cmd, log *stage.Buffer) {
	t.Helper()
	log = new(stage.Buffer)
	cmd = exec.Command("/bin/sh", append([]string{"-c", `ulimit -c unlimited && exec "$0" "$@"`, program}, args...)...)
	cmd.Dir, cmd.Stderr, cmd.Env = dir, log, append(os.Environ(), "GOTRACEBACK=crash", "MERLON_AGENT_JOIN_TOKEN=token")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: stranger, Gid: stranger}}
	if _, err := cmd.StdinPipe(); err != nil { // a program that reads it goes on
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("log of %s:\n%.4000s", program, log)
		}
	})
	return cmd, log
}

func TestMemoryIsNobodyElses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	open := func(dir string) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	open(filepath.Dir(stage.Bin(t, "merlon-ca")))
	for name, p := range map[string]struct {
		args  []string // of files in its folder
		ready string
		// hidden: others of its user cannot look into it.
		private, hidden bool
	}{
		"merlon-ca": {[]string{"-trust-domain=shop.test", "-data-dir=DIR/data", "-admin-socket=DIR/s/admin.sock", "-address=127.0.0.1:0", "-https-address=127.0.0.1:0", "-health-address=127.0.0.1:0"}, "CA serves", true, true},
		"merlon-agent": {[]string{
			"-trust-domain=shop.test", "-data-dir=DIR/data", "-admin-socket=DIR/a/admin.sock", "-public-socket=DIR/p/api.sock", "-health-address=off",
			"-ca-address=127.0.0.1:1", "-root-hash=" + strings.Repeat("0", 64),
		}, "no connection to the CA", true, true},
		// An agent of its user must be able to see which program it is.
		"merlon-sidecar": {[]string{"-agent-socket=unix://DIR/none.sock", "-agent-uid=4242", "-health-address=off", "-inbound=127.0.0.1:PORT,127.0.0.1:1,http"}, "agent does not answer", true, false},
		// What the others would be without their care, or this shows nothing.
		"a program like others": {nil, "", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := stage.Dir(t)
			if err := os.Chown(dir, stranger, stranger); err != nil {
				t.Fatal(err)
			}
			program := name
			if p.args == nil {
				program = stage.Build(t, "workload", "integration/workload", "")
			}
			args := make([]string, len(p.args))
			for i, arg := range p.args {
				args[i] = strings.NewReplacer("DIR", dir, "PORT", fmt.Sprint(stage.FreePort(t))).Replace(arg)
			}
			cmd, log := asStranger(t, dir, stage.Bin(t, program), args...)
			stage.Eventually(t, "it runs", func() error {
				exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
				if err != nil || exe != stage.Bin(t, program) || !strings.Contains(log.String(), p.ready) {
					return fmt.Errorf("%s, %v", exe, err)
				}
				return nil
			})
			for _, file := range []string{"environ", "mem", "maps", "exe"} {
				look := exec.Command("/bin/sh", "-c", fmt.Sprintf("exec 3< /proc/%d/%s", cmd.Process.Pid, file))
				look.SysProcAttr = cmd.SysProcAttr
				if err := look.Run(); (err != nil) != p.hidden {
					t.Errorf("another process of its user opens its %s: %v; want it refused = %t", file, err, p.hidden)
				}
			}
			if err := cmd.Process.Signal(syscall.SIGABRT); err != nil {
				t.Fatal(err)
			}
			err := cmd.Wait()
			exit, ok := errors.AsType[*exec.ExitError](err)
			if !ok {
				t.Fatalf("it ended with %v", err)
			}
			status := exit.Sys().(syscall.WaitStatus)
			cores, _ := filepath.Glob(filepath.Join(dir, "*core*"))
			switch left := status.CoreDump() || len(cores) > 0; {
			case !status.Signaled():
				t.Errorf("it ended with %s; want a crash", exit)
			case left && p.private:
				t.Errorf("it leaves a core image: %s, %v", exit, cores)
			case !left && !p.private:
				t.Logf("core images cannot be made here (/proc/sys/kernel/core_pattern), so that there are none shows nothing")
			}
		})
	}
}

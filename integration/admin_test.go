// The admin sockets, seen by users of the machine.

package integration_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/integration/stage"
)

// asUID runs the CLI as another user of the machine.
func asUID(t *testing.T, uid uint32, admin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), stage.Bin(t, "merlon"), args...)
	cmd.Env = append(os.Environ(), "MERLON_ADMIN="+admin)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// openPath lets other users pass through the folders of the test.
func openPath(t *testing.T, dirs ...string) {
	t.Helper()
	for _, dir := range dirs {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAdminUIDsAdministerAndOthersDoNot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	const operator, stranger, viewer = 12345, 12346, 12347
	t.Setenv("MERLON_CA_ADMIN_UIDS", "12345")
	t.Setenv("MERLON_AGENT_ADMIN_UIDS", "12345")
	d := stage.Separate(t, "admins:\n  - uid: 12347\n    role: viewer\n")
	stage.Eventually(t, "the agent serves", func() error { _, err := os.Stat(d.AgentAdmin); return err })
	openPath(t, filepath.Dir(stage.Bin(t, "merlon")), filepath.Dir(filepath.Dir(d.Admin)), filepath.Dir(filepath.Dir(d.AgentAdmin)))
	for _, call := range []struct {
		admin string
		args  []string
	}{
		{d.Admin, []string{"agent", "list"}},
		{d.AgentAdmin, []string{"explain", "identity", "--pid", "1"}},
	} {
		if out, err := asUID(t, operator, call.admin, call.args...); err != nil {
			t.Errorf("merlon %v by an admin uid: %v\n%s", call.args, err, out)
		}
		out, err := asUID(t, stranger, call.admin, call.args...)
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 4 || !strings.Contains(out, "hint:") { //nolint:errorlint // straight from CombinedOutput
			t.Errorf("merlon %v by another uid: %v\n%s", call.args, err, out)
		}
	}
	if out, err := asUID(t, viewer, d.Admin, "agent", "list"); err != nil {
		t.Errorf("a viewer lists agents: %v\n%s", err, out)
	}
	if out, err := asUID(t, viewer, d.Admin, "token", "create"); err == nil || !strings.Contains(out, "which is for: operator; its role is viewer") {
		t.Errorf("a viewer makes a token: %v\n%s", err, out)
	}
}

// The places of the agent's sockets: their modes, and what another user of the
// machine can put in the way (SECURITY.md T49, DESIGN.md §6).

package integration_test

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"merlon.dev/integration/stage"
)

const stranger = 4242 // a user of the machine

// asStranger runs a shell command as another user.
func asStranger(t *testing.T, dir, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: stranger, Gid: stranger}}
	return cmd
}

// agentArgs are of an agent with its public socket at path; its CA is away.
func agentArgs(t *testing.T, path string) []string {
	t.Helper()
	private := stage.Dir(t)
	return []string{
		"-trust-domain", "shop.test", "-ca-address", "127.0.0.1:1", "-health-address", "off", "-data-dir", filepath.Join(private, "data"),
		"-admin-socket", filepath.Join(private, "admin", "admin.sock"), "-public-socket", path,
	}
}

func TestSocketInAHostilePlaceIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	for name, tc := range map[string]struct {
		script string // what the stranger does in a folder like /tmp
		path   string // of the socket, below it
		want   string
	}{
		"his directory":                   {"mkdir public", "public/api.sock", "belongs to uid 4242"},
		"his directory with a socket":     {"mkdir public && touch public/api.sock", "public/api.sock", "belongs to uid 4242"},
		"his directory above":             {"mkdir -p merlon/agent", "merlon/agent/public/api.sock", "belongs to uid 4242"},
		"a link instead of the directory": {"ln -s /run public", "public/api.sock", "is not a directory"},
		"a link of his above":             {"mkdir his && ln -s his merlon", "merlon/public/api.sock", "belongs to uid 4242"},
		"a link instead of the socket":    {"ln -s /run/merlon.sock api.sock", "api.sock", "lets other users in"},
		"a file instead of the socket":    {"touch api.sock", "api.sock", "lets other users in"},
	} {
		t.Run(name, func(t *testing.T) {
			base := stage.Dir(t)
			if err := os.Chmod(base, 0o777|fs.ModeSticky); err != nil {
				t.Fatal(err)
			}
			if err := asStranger(t, base, tc.script).Run(); err != nil {
				t.Fatal(err)
			}
			_, stderr, err := stage.Run(t.Context(), t, nil, "merlon-agent", agentArgs(t, filepath.Join(base, tc.path))...)
			exit := new(exec.ExitError)
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(stderr, tc.want) || !strings.Contains(stderr, "public socket") {
				t.Errorf("merlon-agent: %v\n%s; want it to end, with %q", err, stderr, tc.want)
			}
		})
	}
}

// A socket on which a stranger listens already, in the agent's own directory: he
// got in before it was closed.
func TestSocketOnWhichSomebodyListensIsRefused(t *testing.T) {
	path := filepath.Join(stage.Dir(t), "api.sock")
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	_, stderr, err := stage.Run(t.Context(), t, nil, "merlon-agent", agentArgs(t, path)...)
	if err == nil || !strings.Contains(stderr, "another process listens there") || !strings.Contains(stderr, "hint:") {
		t.Errorf("merlon-agent: %v\n%s; want that somebody listens there, and a hint", err, stderr)
	}
}

// Everybody can use the public socket and nobody replace it; the admin socket is
// closed.
func TestModesOfTheAgentsSockets(t *testing.T) {
	d := stage.Separate(t)
	public := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	for path, want := range map[string]fs.FileMode{
		public: 0o777, filepath.Dir(public): 0o755, d.AgentAdmin: 0o600, filepath.Dir(d.AgentAdmin): 0o700,
	} {
		stage.Eventually(t, path+" is there", func() error {
			fi, err := os.Stat(path)
			if err != nil {
				return err
			}
			if fi.Mode().Perm() != want || fi.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
				return errors.New("it has mode " + fi.Mode().String())
			}
			return nil
		})
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	register(t, d, "/stranger", byUser(stranger))
	startWorkload(t, d, stranger).want("open", "svids /stranger")
	for _, script := range []string{"rm -f " + public, "mv " + public + " " + public + ".old", "rmdir " + filepath.Dir(public), "ls " + filepath.Dir(d.AgentAdmin)} {
		cmd := asStranger(t, "/", script)
		cmd.Stderr = nil
		if err := cmd.Run(); err == nil {
			t.Errorf("a stranger could %s", script)
		}
	}
	startWorkload(t, d, stranger).want("open", "svids /stranger")
}

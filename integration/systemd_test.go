// The daemons under a service manager: notifications on a real socket, the
// watchdog, and a Workload API socket that is not the agent's own.

package integration_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// manager is the part of systemd that a daemon sees.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
	path string
	// socket is passed to the daemon; nil: none.
	socket *os.File
	cmd    *exec.Cmd
	log    stage.Buffer
}

func newManager(t *testing.T) *manager {
	t.Helper()
	m := &manager{t: t, path: filepath.Join(stage.Dir(t), "notify")}
	var err error
	if m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if m.cmd != nil {
			m.end(syscall.SIGKILL)
		}
		m.conn.Close()
		if t.Failed() {
			t.Logf("log of the daemon:\n%s", m.log.String())
		}
	})
	return m
}

// listen opens a socket as a .socket unit does.
func (m *manager) listen(path string) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		m.t.Fatal(err)
	}
	if m.socket, err = lis.File(); err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { m.socket.Close(); lis.Close() })
}

// start starts the daemon; LISTEN_PID is its own, so a shell sets it.
func (m *manager) start(name string, args ...string) {
	m.t.Helper()
	script := `exec "$0" "$@"`
	if m.socket != nil {
		script = `export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=merlon-agent.socket; ` + script
	}
	m.cmd = exec.Command("/bin/sh", append([]string{"-c", script, stage.Bin(m.t, name)}, args...)...)
	m.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.path, "WATCHDOG_USEC=1000000")
	m.cmd.Stderr, m.cmd.Stdout = &m.log, &m.log
	if m.socket != nil {
		m.cmd.ExtraFiles = []*os.File{m.socket}
	}
	if err := m.cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
}

func (m *manager) end(sig syscall.Signal) {
	m.t.Helper()
	m.cmd.Process.Signal(sig)
	m.cmd.Wait()
	m.cmd = nil
}

// hears waits for a notification that contains words, and returns those before.
func (m *manager) hears(words string) (before []string) {
	m.t.Helper()
	b := make([]byte, 4096)
	for {
		if err := m.conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			m.t.Fatal(err)
		}
		n, err := m.conn.Read(b)
		if err != nil {
			m.t.Fatalf("%q was not heard: %v; before: %q\n%s", words, err, before, m.log.String())
		}
		if strings.Contains(string(b[:n]), words) {
			return before
		}
		before = append(before, string(b[:n]))
	}
}

// The agent is ready when it has the node's entries, not before; the socket
// stays over its restart, and who connects while there is no agent is answered
// by the next one, also when the CA is dead.
func TestAgentUnderSystemd(t *testing.T) {
	d := stage.CAAlone(t, "merlon-ca", nil)
	token := d.Token()
	d.CA.Kill()
	config := d.AgentConfig(token.RootHash, "join_token: "+token.Token)
	m := newManager(t)
	m.listen(strings.TrimPrefix(d.WorkloadAPI, "unix://"))
	m.start("merlon-agent", "-config", config)
	for _, said := range m.hears("WATCHDOG=1") { // it lives, and is not ready: it does not know its entries
		if strings.Contains(said, "READY=1") {
			t.Errorf("ready without a CA: %q", said)
		}
	}
	d.CA.Restart()
	m.hears("READY=1")
	d.Entry("/me", "--parent", token.AgentID)
	var before *x509svid.SVID
	stage.Eventually(t, "an SVID is served", func() (err error) {
		before, err = fetch(t, d)
		return err
	})
	kept(t, d, `"svids":[{`)
	d.CA.Kill()

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		m.end(sig)
		if sig == syscall.SIGTERM {
			m.hears("STOPPING=1")
		}
		type result struct {
			svid *x509svid.SVID
			err  error
		}
		got := make(chan result, 1)
		go func() { // nobody is there to answer; the connection waits
			svid, err := fetch(t, d)
			got <- result{svid, err}
		}()
		stage.Eventually(t, "a client waits at the socket", func() error { return waiting(d) })
		m.start("merlon-agent", "-config", config)
		if r := <-got; r.err != nil || !same(before, r.svid) {
			t.Errorf("after %v the waiting client got %v, %v; want the SVID from before", sig, r.svid, r.err)
		}
		m.hears("READY=1")
		m.hears("WATCHDOG=1")
	}
}

// waiting says whether a client has connected to the public socket that no
// agent has taken: ss would show it so, and /proc does.
func waiting(d *stage.Domain) error {
	table, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return err
	}
	path := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	n := 0
	for line := range strings.Lines(string(table)) {
		if strings.HasSuffix(strings.TrimSpace(line), " "+path) {
			n++
		}
	}
	if n < 2 { // the one that listens, and one that waits to be accepted
		return fmt.Errorf("%d sockets at %s", n, path)
	}
	return nil
}

// A socket that no setting names would be served by nobody.
func TestStrangeSocketIsRefused(t *testing.T) {
	d := stage.CAAlone(t, "merlon-ca", nil)
	token := d.Token()
	config := d.AgentConfig(token.RootHash, "join_token: "+token.Token)
	m := newManager(t)
	m.listen(filepath.Join(stage.Dir(t), "other", "api.sock"))
	m.start("merlon-agent", "-config", config)
	err := m.cmd.Wait()
	m.cmd = nil
	if exit := new(exec.ExitError); !errors.As(err, &exit) || !strings.Contains(m.log.String(), "hint: let ListenStream=") {
		t.Errorf("the agent ended with %v: %s", err, m.log.String())
	}
}

func TestCAUnderSystemd(t *testing.T) {
	d := stage.CAAlone(t, "merlon-ca", nil)
	d.CA.Stop()
	m := newManager(t)
	m.start("merlon-ca", d.CA.Args...)
	m.hears("READY=1")
	m.hears("WATCHDOG=1")
	m.hears("WATCHDOG=1")
	if _, stderr, err := d.Try("agent", "list"); err != nil {
		t.Errorf("ready, and does not answer: %v %s", err, stderr)
	}
	// One that hangs says nothing any more.
	if err := m.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	m.conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	silent := false
	for b := make([]byte, 4096); !silent; {
		_, err := m.conn.Read(b)
		silent = errors.Is(err, os.ErrDeadlineExceeded)
		if err != nil && !silent {
			t.Fatal(err)
		}
	}
	m.cmd.Process.Signal(syscall.SIGCONT)
	m.hears("WATCHDOG=1")
	m.end(syscall.SIGTERM)
	m.hears("STOPPING=1")
}

// The sidecar is ready when it serves, says so again after each reload, good or not, and
// lives until it stops.
func TestSidecarUnderSystemd(t *testing.T) {
	d := stage.Dev(t)
	m, port := newManager(t), stage.FreePort(t)
	config := filepath.Join(stage.Dir(t), "sidecar.yaml")
	configure := func(more string) {
		text := fmt.Sprintf("agent_socket: %s\nhealth_address: 127.0.0.1:%d\n%soutbound: [{listen: '127.0.0.1:0', to: shop, upstreams: ['127.0.0.1:1'], protocol: http}]\n", d.WorkloadAPI, port, more)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	configure("")
	m.start("merlon-sidecar", "-config", config)
	m.hears("STATUS=waiting for an identity")
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/shop"), "--selector", "unix:path:"+stage.Bin(t, "merlon-sidecar"))
	ready := "READY=1\nSTATUS=serving " + d.ID("/shop")
	for _, said := range m.hears(ready) {
		if strings.Contains(said, "READY=1") {
			t.Errorf("ready before: %q", said)
		}
	}
	m.hears("WATCHDOG=1")
	for _, more := range []string{"", "no_setting: 1\n"} {
		configure(more)
		if err := m.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		m.hears("RELOADING=1\nMONOTONIC_USEC=")
		m.hears(ready)
	}
	m.hears("WATCHDOG=1")
	m.end(syscall.SIGTERM)
	m.hears("STOPPING=1")
}

// The unit files that are shipped are what systemd accepts, and agree with the
// defaults of the configuration.
// What others do at a hangup, they do not; but they do not end either, which would
// be for good under Restart=on-failure.
func TestHangupEndsNoDaemon(t *testing.T) {
	d := stage.Separate(t)
	d.Entry("/web")
	services.Open(t, d, sdk.WithStartupTimeout(30*time.Second)) // both serve
	for name, p := range map[string]*stage.Process{"the CA": d.CA, "the agent": d.Agent} {
		pid := p.PID()
		if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		stage.Eventually(t, name+" says what SIGHUP does", func() error {
			if log := p.Log(); !strings.Contains(log, "settings are read at the start") {
				return errors.New(log)
			}
			return nil
		})
	}
	services.Open(t, d, sdk.WithStartupTimeout(30*time.Second))
	d.Merlon("agent", "list")
}

func TestUnitFilesAreValid(t *testing.T) {
	units, err := filepath.Glob("../examples/systemd/*.*")
	if err != nil || len(units) != 4 {
		t.Fatalf("units: %q, %v", units, err)
	}
	dir := stage.Dir(t)
	args := []string{"verify"}
	for _, unit := range units {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(unit, ".socket") && !strings.Contains(string(text), "\nListenStream=/run/merlon/agent/public/api.sock\n") {
			t.Errorf("%s opens another socket than the default of public_socket", unit)
		}
		copied := filepath.Join(dir, filepath.Base(unit))
		here := strings.ReplaceAll(string(text), "/usr/bin/merlon-", stage.Bin(t, "merlon-ca")[:len(stage.Bin(t, "merlon-ca"))-len("ca")])
		if err := os.WriteFile(copied, []byte(here), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, copied)
	}
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd-analyze is missing: apt-get install systemd")
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", args...).CombinedOutput()
	if err != nil || strings.Contains(string(out), dir) {
		t.Errorf("systemd-analyze %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

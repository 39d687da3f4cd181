// A real etcd: one member or three as processes of their own, over mutual TLS,
// in temporary folders. Members can be killed, paused and restarted; in network
// namespaces (netns.go) they can be cut off, too.

package stage

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// buildEtcd compiles the member once for the whole test process.
var buildEtcd = sync.OnceValues(func() (string, error) { return buildModule("etcdmember") })

// Etcd is a running cluster. Its methods are for one goroutine.
type Etcd struct {
	TB      testing.TB
	Members []*EtcdMember
	// Files are what a client needs.
	Files EtcdFiles
	flags []string
	bin   string
	ca    *testCA
}

// EtcdFiles are paths of PEM files: the cluster's CA and a client certificate.
type EtcdFiles struct{ CA, Cert, Key string }

// EtcdMember is one member. Its methods are for one goroutine, but Log.
type EtcdMember struct {
	Name string
	// Endpoint is its client URL.
	Endpoint string
	// Space is its network namespace; nil: that of the test.
	Space *Namespace

	etcd         *Etcd
	peer         string
	dir          string
	files        EtcdFiles
	cmd          *exec.Cmd
	stdin        io.Closer
	log          Buffer
	pausedByTest bool
}

// StartEtcd starts a cluster of 1 or 3 members, with further flags of etcd's,
// e.g. --quota-backend-bytes=16777216. It ends with the test.
func StartEtcd(tb testing.TB, members int, flags ...string) *Etcd {
	tb.Helper()
	e := newEtcd(tb, flags)
	for i := range members {
		e.add(i, "127.0.0.1", nil)
	}
	e.start()
	return e
}

func newEtcd(tb testing.TB, flags []string) *Etcd {
	tb.Helper()
	bin, err := buildEtcd()
	if err != nil {
		tb.Fatal(err)
	}
	return &Etcd{TB: tb, bin: bin, flags: flags}
}

func (e *Etcd) add(i int, host string, space *Namespace) {
	e.TB.Helper()
	client, peer := 2379, 2380
	if space == nil {
		client, peer = FreePort(e.TB), FreePort(e.TB)
	}
	e.Members = append(e.Members, &EtcdMember{
		Name: fmt.Sprintf("m%d", i), etcd: e, Space: space, dir: Dir(e.TB),
		Endpoint: fmt.Sprintf("https://%s:%d", host, client),
		peer:     fmt.Sprintf("https://%s:%d", host, peer),
	})
}

func (e *Etcd) start() {
	e.TB.Helper()
	e.ca = newCA(e.TB)
	e.Files = e.Issue("client")
	for _, m := range e.Members {
		m.files = e.ca.issue(e.TB, m.dir, m.host())
	}
	e.TB.Cleanup(func() {
		for _, m := range e.Members {
			m.Kill()
			if e.TB.Failed() {
				e.TB.Logf("log of etcd member %s:\n%s", m.Name, tail(m.log.String()))
			}
		}
	})
	for _, m := range e.Members {
		m.Start()
	}
	Eventually(e.TB, "etcd has a leader and takes writes", e.ready)
}

func tail(log string) string { return log[max(0, len(log)-16<<10):] }

// ready tells whether every member answers and knows the leader.
func (e *Etcd) ready() error {
	for _, m := range e.Members {
		if _, leader, err := m.status(); err != nil || leader == 0 {
			return fmt.Errorf("member %s: leader %x, %v", m.Name, leader, err)
		}
	}
	return nil
}

// Endpoints are the client URLs of all members.
func (e *Etcd) Endpoints() []string {
	urls := make([]string, len(e.Members))
	for i, m := range e.Members {
		urls[i] = m.Endpoint
	}
	return urls
}

// Issue makes another client certificate, in a folder of its own.
func (e *Etcd) Issue(name string) EtcdFiles {
	e.TB.Helper()
	return e.ca.issue(e.TB, Dir(e.TB), name)
}

// Leader waits until the members that answer agree on a leader, and returns it.
func (e *Etcd) Leader() *EtcdMember {
	e.TB.Helper()
	var leading *EtcdMember
	Eventually(e.TB, "etcd has one leader", func() error {
		leading = nil
		var leaders []uint64
		for _, m := range e.Members {
			self, leader, err := m.status()
			if err != nil {
				continue
			}
			leaders = append(leaders, leader)
			if self == leader {
				leading = m
			}
		}
		for _, l := range leaders {
			if l != leaders[0] {
				return fmt.Errorf("members know leaders %x", leaders)
			}
		}
		if leading == nil {
			return errors.New("no member leads")
		}
		return nil
	})
	return leading
}

// Client returns a client of the members, of all if none are named; it is
// closed with the test.
func (e *Etcd) Client(members ...*EtcdMember) *clientv3.Client {
	e.TB.Helper()
	urls := e.Endpoints()
	if len(members) > 0 {
		urls = nil
		for _, m := range members {
			urls = append(urls, m.Endpoint)
		}
	}
	client, err := e.dial(urls)
	if err != nil {
		e.TB.Fatal(err)
	}
	e.TB.Cleanup(func() { client.Close() })
	return client
}

// Remove removes every key that begins with prefix, behind everybody's back, and
// says how many there were.
func (e *Etcd) Remove(prefix string) int64 {
	e.TB.Helper()
	removed, err := e.Client().Delete(e.TB.Context(), prefix, clientv3.WithPrefix())
	if err != nil {
		e.TB.Fatal(err)
	}
	return removed.Deleted
}

func (e *Etcd) dial(urls []string) (*clientv3.Client, error) {
	config, err := e.Files.tls()
	if err != nil {
		return nil, err
	}
	return clientv3.New(clientv3.Config{Endpoints: urls, TLS: config, Logger: zap.NewNop()})
}

// Kill ends the member with SIGKILL and waits for it.
func (m *EtcdMember) Kill() {
	if m.cmd == nil {
		return
	}
	m.cmd.Process.Kill()
	m.cmd.Wait()
	m.stdin.Close()
	m.cmd = nil
	m.pausedByTest = false
}

// Stop ends the member as an operator would, with SIGTERM.
func (m *EtcdMember) Stop() {
	if m.cmd == nil {
		return
	}
	m.Resume()
	m.cmd.Process.Signal(syscall.SIGTERM)
	late := time.AfterFunc(15*time.Second, func() { m.cmd.Process.Kill() })
	m.cmd.Wait()
	late.Stop()
	m.stdin.Close()
	m.cmd = nil
}

// Pause halts the member with SIGSTOP: its connections stay, nothing answers.
func (m *EtcdMember) Pause() {
	m.cmd.Process.Signal(syscall.SIGSTOP)
	// Returns when the last thread has stopped; until then it may answer.
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(m.cmd.Process.Pid, &status, syscall.WUNTRACED, nil)
		if err == nil && status.Stopped() {
			break
		}
		if !errors.Is(err, syscall.EINTR) {
			m.etcd.TB.Fatalf("pause etcd member %s: %v", m.Name, err)
		}
	}
	m.pausedByTest = true
}

// Resume lets a paused member go on.
func (m *EtcdMember) Resume() {
	if m.pausedByTest {
		m.cmd.Process.Signal(syscall.SIGCONT)
		m.pausedByTest = false
	}
}

// Start starts the member on the data that it has, and does not wait for it.
func (m *EtcdMember) Start() {
	m.etcd.TB.Helper()
	var cluster []string
	for _, other := range m.etcd.Members {
		cluster = append(cluster, other.Name+"="+other.peer)
	}
	args := append([]string{
		"--name=" + m.Name, "--data-dir=" + filepath.Join(m.dir, "data"),
		"--listen-client-urls=" + m.Endpoint, "--advertise-client-urls=" + m.Endpoint,
		"--listen-peer-urls=" + m.peer, "--initial-advertise-peer-urls=" + m.peer,
		"--initial-cluster=" + strings.Join(cluster, ","), "--initial-cluster-token=merlon-test",
		"--client-cert-auth", "--trusted-ca-file=" + m.files.CA, "--cert-file=" + m.files.Cert, "--key-file=" + m.files.Key,
		"--peer-client-cert-auth", "--peer-trusted-ca-file=" + m.files.CA, "--peer-cert-file=" + m.files.Cert, "--peer-key-file=" + m.files.Key,
		"--log-level=warn",
	}, m.etcd.flags...)
	m.cmd = m.Space.command(m.etcd.bin, args...)
	m.cmd.Stdout, m.cmd.Stderr = &m.log, &m.log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if m.stdin, err = m.cmd.StdinPipe(); err == nil {
		err = m.cmd.Start()
	}
	if err != nil {
		m.etcd.TB.Fatal(err)
	}
}

// Restart kills the member if it runs, starts it and waits until it knows the
// leader.
func (m *EtcdMember) Restart() {
	m.etcd.TB.Helper()
	m.Kill()
	m.Start()
	Eventually(m.etcd.TB, "etcd member "+m.Name+" is back", func() error {
		if _, leader, err := m.status(); err != nil || leader == 0 {
			return fmt.Errorf("leader %x, %v", leader, err)
		}
		return nil
	})
}

// PID is that of the member, which runs.
func (m *EtcdMember) PID() int { return m.cmd.Process.Pid }

// Log is what the member has written so far.
func (m *EtcdMember) Log() string { return m.log.String() }

func (m *EtcdMember) host() string {
	host, _, _ := strings.Cut(strings.TrimPrefix(m.Endpoint, "https://"), ":")
	return host
}

// status asks the member for its ID and that of the leader.
func (m *EtcdMember) status() (self, leader uint64, err error) {
	if m.cmd == nil || m.pausedByTest {
		return 0, 0, errors.New("not running")
	}
	client, err := m.etcd.dial([]string{m.Endpoint})
	if err != nil {
		return 0, 0, err
	}
	defer client.Close()
	ctx, cancel := timeout(m.etcd.TB, time.Second)
	defer cancel()
	s, err := client.Status(ctx, m.Endpoint)
	if err != nil {
		return 0, 0, err
	}
	return s.Header.MemberId, s.Leader, nil
}

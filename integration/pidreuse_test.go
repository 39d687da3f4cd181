// SECURITY.md T2: a process connects and ends, another gets its number, and
// somebody still holds the connection. The answer must not be for the other.
// The test runs in a PID namespace of its own, where it says which number is
// next, with a CA and an agent in it.

package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/integration/stage"
)

// reuses is how often a number is given to another process; `make pidreuse`
// asks for more.
func reuses(t *testing.T) int {
	t.Helper()
	text := os.Getenv("REUSES")
	if text == "" {
		return 500
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("REUSES=%s is not a number of times", text)
	}
	return n
}

func TestReusedProcessIDGetsNoForeignSVID(t *testing.T) {
	workloadBin(t) // built here, where other processes have their numbers
	if !stage.InPIDNamespace(t) {
		return
	}
	d := stage.Dev(t)
	socket := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	attacker, victim := copyOfWorkload(t, "attacker"), copyOfWorkload(t, "victim")
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/victim"), "--selector", "unix:path:"+victim)
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/attacker"), "--selector", "unix:path:"+attacker)
	wantOwn(t, victim, socket, d.ID("/victim"))

	total := reuses(t)
	reused, foreign, missed := 0, 0, 0
	for i := 0; reused < total; i++ {
		if missed > total+100 {
			t.Fatalf("of %d numbers only %d could be given to another process", i, reused)
		}
		got, ok := reuse(t, attacker, victim, socket, i%2 == 0)
		if !ok {
			missed++
			continue
		}
		reused++
		if got.err == nil {
			foreign++
			t.Errorf("number %d: the connection of a process that is gone got %q", got.pid, got.ids)
		} else if code := status.Code(got.err); code != codes.Unavailable {
			t.Errorf("number %d: %v; want Unavailable", got.pid, got.err)
		}
		if t.Failed() && foreign > 5 {
			break
		}
	}
	wantOwn(t, victim, socket, d.ID("/victim"))
	t.Logf("%d times a number went to another process, %d times it did not; %d foreign SVIDs", reused, missed, foreign)
}

func copyOfWorkload(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(workloadBin(t))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(stage.Dir(t), name)
	if err := os.WriteFile(path, content, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// wantOwn shows that a process of this program has the identity that nobody else
// may get.
func wantOwn(t *testing.T, program, socket, id string) {
	t.Helper()
	p := connectAs(t, program, socket)
	defer p.close()
	if ids, err := p.svids(); err != nil || len(ids) != 1 || ids[0] != id {
		t.Fatalf("the identities of %s are %q, %v; want %s", program, ids, err, id)
	}
}

// outcome is what a connection got after its process became another.
type outcome struct {
	pid int
	ids []string
	err error
}

// reuse lets a process connect and end, gives its number to another, and asks
// on the connection. With early it asked before, so that the agent has seen the
// first process.
func reuse(t *testing.T, attacker, victim, socket string, early bool) (outcome, bool) {
	t.Helper()
	p := connectAs(t, attacker, socket)
	defer p.close()
	if early {
		if ids, err := p.svids(); err != nil || !strings.HasSuffix(ids[0], "/attacker") {
			t.Fatalf("the connecting process got %q, %v; want its own identity", ids, err)
		}
	}
	pid := p.cmd.Process.Pid
	p.end()
	if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0o600); err != nil {
		t.Fatal(err)
	}
	other := exec.Command(victim)
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	if other.Process.Pid != pid { // a thread of somebody took it
		return outcome{}, false
	}
	ids, err := p.svids()
	return outcome{pid, ids, err}, true
}

// connected is a connection to the agent that another process made.
type connected struct {
	cmd   *exec.Cmd
	stdin io.Closer
	cc    *grpc.ClientConn
}

// connectAs lets a process of program connect a socket, and keeps the socket.
func connectAs(t *testing.T, program, socket string) *connected {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close()
	p := &connected{cmd: exec.Command(program, "connect", socket)}
	p.cmd.ExtraFiles, p.cmd.Stderr = []*os.File{file}, os.Stderr
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, len("connected\n"))); err != nil {
		t.Fatalf("the process did not connect: %v", err)
	}
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	once := make(chan net.Conn, 1)
	once <- conn
	p.cc, err = grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case conn := <-once:
				return conn, nil
			default:
				return nil, errors.New("the connection is there once only")
			}
		}))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *connected) end() {
	p.stdin.Close()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func (p *connected) close() {
	p.end()
	p.cc.Close()
}

// svids are the SPIFFE IDs that the connection gets.
func (p *connected) svids() (ids []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(p.cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	m, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	for _, s := range m.GetSvids() {
		ids = append(ids, s.GetSpiffeId())
	}
	if len(ids) == 0 {
		return nil, fmt.Errorf("an answer without SVIDs")
	}
	return ids, nil
}

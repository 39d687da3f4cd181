// T4: a connection to the agent is handed to a process of another user.

package attacks_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/integration/stage"
)

// passTo, in the environment, makes this program connect to the agent there and send
// the connection over its file descriptor 3.
const passTo = "MERLON_ATTACK_PASS"

func passConnection(path string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	file, err := conn.(*net.UnixConn).File()
	if err != nil {
		return err
	}
	if err := syscall.Sendmsg(3, []byte("x"), syscall.UnixRights(int(file.Fd())), nil, 0); err != nil {
		return err
	}
	_, _ = bufio.NewReader(os.Stdin).ReadByte() // lives until stdin ends
	return nil
}

// receive is the connection that a process of a user made and passed on; end ends that
// process.
func receive(t *testing.T, uid uint32, path string) (conn net.Conn, end func()) {
	t.Helper()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	defer theirs.Close()
	defer syscall.Close(pair[0])
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stderr, cmd.Dir = append(os.Environ(), passTo+"="+path), os.Stderr, "/"
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	}
	t.Cleanup(end)
	theirs.Close()
	rights := make([]byte, syscall.CmsgSpace(4))
	_, n, _, _, err := syscall.Recvmsg(pair[0], make([]byte, 1), rights, 0)
	if err != nil || n == 0 {
		t.Fatalf("nothing was passed: %v", err)
	}
	messages, err := syscall.ParseSocketControlMessage(rights[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "passed")
	defer file.Close()
	if conn, err = net.FileConn(file); err != nil {
		t.Fatal(err)
	}
	return conn, end
}

// svids are the paths of the X509-SVIDs that a stream on the connection begins with.
func svids(ctx context.Context, cc *grpc.ClientConn) (string, error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return "", err
	}
	m, err := stream.Recv()
	if err != nil {
		return "", err
	}
	var ids []string
	for _, s := range m.GetSvids() {
		ids = append(ids, s.GetSpiffeId())
	}
	return strings.Join(ids, " "), nil
}

// over is a gRPC client on one connection.
func over(t *testing.T, conn net.Conn) *grpc.ClientConn {
	t.Helper()
	once := make(chan net.Conn, 1)
	once <- conn
	cc, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
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
	t.Cleanup(func() { cc.Close() })
	return cc
}

func TestPassedConnectionIsItsMakers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	d := stage.Separate(t)
	for path, uid := range map[string]int{"/maker": stranger, "/taker": 0} {
		d.Merlon("entry", "create", "--spiffe-id", d.ID(path), "--parent", d.AgentID(), "--selector", fmt.Sprintf("unix:uid:%d", uid))
	}
	public := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	openTo(t, public)
	stage.Eventually(t, "the agent serves", func() error {
		conn, err := net.Dial("unix", public)
		if err == nil {
			conn.Close()
		}
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, end := receive(t, stranger, public)
	passed := over(t, conn)
	for range 2 { // each new stream is attested by itself
		if got, err := svids(ctx, passed); err != nil || got != d.ID("/maker") {
			t.Errorf("on the passed connection: %q, %v; want %s", got, err, d.ID("/maker"))
		}
	}
	own, err := net.Dial("unix", public)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := svids(ctx, over(t, own)); err != nil || got != d.ID("/taker") {
		t.Errorf("on a connection of one's own: %q, %v; want %s", got, err, d.ID("/taker"))
	}
	end()
	if got, err := svids(ctx, passed); status.Code(err) != codes.Unavailable {
		t.Errorf("its maker is gone, and it gets %q, %v; want Unavailable", got, err)
	}
}

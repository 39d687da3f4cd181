// A workload that becomes another program while its stream is open.

package agent_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"merlon.dev/agent/internal/fakeca"
)

// actWorkload is this binary as a workload: it opens a stream of the Workload API
// and one of SDS over a socket that outlives exec, and becomes another program when told.
func actWorkload(socket, other string) error {
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, err
		}
		raw, err := conn.(*net.UnixConn).SyscallConn()
		if err != nil {
			return nil, err
		}
		return conn, raw.Control(func(fd uintptr) { _, _, _ = syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_SETFD, 0) })
	}
	cc, err := grpc.NewClient("passthrough:///agent", grpc.WithContextDialer(dial), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx := metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	secrets, err := secretv3.NewSecretDiscoveryServiceClient(cc).DeltaSecrets(ctx)
	if err != nil {
		return err
	}
	if err := secrets.Send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"ROOTCA"}}); err != nil {
		return err
	}
	if _, err := secrets.Recv(); err != nil {
		return err
	}
	fmt.Println(len(m.Svids))
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	return syscall.Exec(other, []string{"other", "100"}, nil)
}

// metric reads one value without labels from /metrics.
func (n *node) metric(t *testing.T, name string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+n.HealthAddress()+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no metric %s", name)
	return ""
}

// T3: who becomes another program loses his streams, also those that would go
// on by user.
func TestExecEndsOpenStreams(t *testing.T) {
	other, err := filepath.EvalSymlinks("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	ca := fakeca.New(t, td)
	ca.PutEntry(ca.Entry("e1", "/web", uidSelector))
	n := start(t, newConfig(t, ca))
	n.waitReady(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "MERLON_TEST_WORKLOAD="+n.cfg.PublicSocket, "MERLON_TEST_EXEC="+other)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "1\n" {
		t.Fatalf("the workload has %q SVIDs, %v; want 1", line, err)
	}
	if _, err := io.WriteString(stdin, "\n"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is another program", func() bool {
		path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid))
		return err == nil && path == other
	})
	if got := n.metric(t, "merlon_agent_workload_streams"); got != "2" {
		t.Fatalf("%s streams before the change; want 2", got)
	}
	ca.PutEntry(ca.Entry("e2", "/more", uidSelector))
	eventually(t, "its streams end", func() bool { return n.metric(t, "merlon_agent_workload_streams") == "0" })
}

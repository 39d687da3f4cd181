// Helper processes under another uid, for tests that need a foreign server.

package unixsock_test

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"merlon.dev/sdk/unixsock"
)

// asUser starts this test binary again under uid, from a copy that uid can
// read.
func asUser(t *testing.T, uid uint32, run, env string) *exec.Cmd {
	t.Helper()
	bin := filepath.Join(shortDir(t), "test")
	if err := os.Chmod(filepath.Dir(bin), 0o755); err != nil {
		t.Fatal(err)
	}
	copyFile(t, os.Args[0], bin)
	cmd := exec.CommandContext(t.Context(), bin, run)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// waitFor returns once somebody listens at path.
func waitFor(t *testing.T, path string) {
	t.Helper()
	for range 500 {
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("nobody listens on %s", path)
}

// serveAs is the child's part: serve gRPC health at path until killed.
func serveAs(path string) {
	lis, err := net.Listen("unix", path)
	if err != nil {
		panic(err)
	}
	srv := grpc.NewServer(grpc.Creds(unixsock.ServerCredentials()))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	if err := os.Chmod(path, 0o777); err != nil {
		panic(err)
	}
	if err := srv.Serve(lis); err != nil {
		panic(err)
	}
}

// Sockets in hostile places, and peers that come and go.

package unixsock_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"merlon.dev/sdk/unixsock"
)

// shortDir is a directory whose path leaves room for a socket name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "us") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestListenSetsModes(t *testing.T) {
	for name, tc := range map[string]struct {
		access    unixsock.Access
		dir, sock os.FileMode
	}{
		"private": {unixsock.Private, 0o700, 0o600},
		"public":  {unixsock.Public, 0o755, 0o777},
		"shared":  {unixsock.Shared, 0o711, 0o666},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "new", "api.sock")
			lis, err := unixsock.Listen(path, tc.access)
			if err != nil {
				t.Fatal(err)
			}
			defer lis.Close()
			for p, want := range map[string]os.FileMode{path: tc.sock, filepath.Dir(path): tc.dir} {
				fi, err := os.Stat(p)
				if err != nil {
					t.Fatal(err)
				}
				if got := fi.Mode().Perm(); got != want {
					t.Errorf("mode of %s = %04o; want %04o", p, got, want)
				}
			}
		})
	}
}

// A private socket that was there first, as the CA's, does not shut users out of
// a public one beside it, whatever the umask is.
func TestPublicSocketBesideAPrivateOneIsForEveryUser(t *testing.T) {
	before := syscall.Umask(0o077)
	defer syscall.Umask(before)
	top := shortDir(t)
	public := filepath.Join(top, "run", "agent", "public", "api.sock")
	for path, access := range map[string]unixsock.Access{
		filepath.Join(top, "run", "ca", "admin.sock"): unixsock.Private, public: unixsock.Public,
	} {
		lis, err := unixsock.Listen(path, access)
		if err != nil {
			t.Fatal(err)
		}
		defer lis.Close()
	}
	if err := unixsock.Passable(public); err == nil || !strings.Contains(err.Error(), "chmod o+x "+top) {
		t.Errorf("Passable below a folder of mode 0700 = %v; want that named", err)
	}
	if err := os.Chmod(top, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unixsock.Passable(public); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(filepath.Join(top, "run", "ca")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the private socket's directory = %v, %v; want mode 0700", fi.Mode(), err)
	}
}

// T49: whoever comes first cannot take the socket's place.
func TestListenRefusesHostilePlaces(t *testing.T) {
	for name, tc := range map[string]struct {
		arrange func(t *testing.T, path string)
		want    string
	}{
		"directory writable by others": {func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
				t.Fatal(err)
			}
		}, "lets other users in"},
		"directory of another user": {func(t *testing.T, path string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a directory away")
			}
			if err := os.Chown(filepath.Dir(path), 12345, 12345); err != nil {
				t.Fatal(err)
			}
		}, "belongs to uid 12345"},
		"symlink": {func(t *testing.T, path string) {
			if err := os.Symlink("/dev/null", path); err != nil {
				t.Fatal(err)
			}
		}, "in the way"},
		"regular file": {func(t *testing.T, path string) {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "in the way"},
		"somebody listens": {func(t *testing.T, path string) {
			lis, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { lis.Close() })
		}, "another process listens"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "d", "api.sock")
			if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			tc.arrange(t, path)
			lis, err := unixsock.Listen(path, unixsock.Public)
			if err == nil {
				lis.Close()
				t.Fatal("listening was allowed")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error = %q; want it to say %q", err, tc.want)
			}
		})
	}
}

// T49: whoever owns a directory above can rename the one of the socket.
func TestListenRefusesHostilePlacesAbove(t *testing.T) {
	for name, tc := range map[string]struct {
		arrange func(t *testing.T, above string)
		want    string // "": it is fine
	}{
		"of another user": {func(t *testing.T, above string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a directory away")
			}
			if err := os.Chown(above, 12345, 12345); err != nil {
				t.Fatal(err)
			}
		}, "belongs to uid 12345"},
		"writable by others": {func(t *testing.T, above string) {
			if err := os.Chmod(above, 0o777); err != nil {
				t.Fatal(err)
			}
		}, "lets other users replace"},
		"writable by another group": {func(t *testing.T, above string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root to give a directory away")
			}
			if err := errors.Join(os.Chown(above, 0, 12345), os.Chmod(above, 0o775)); err != nil {
				t.Fatal(err)
			}
		}, "lets other users replace"},
		"a link to one that others can write": {func(t *testing.T, above string) {
			open := shortDir(t)
			if err := errors.Join(os.Chmod(open, 0o777), os.Remove(above), os.Symlink(open, above)); err != nil {
				t.Fatal(err)
			}
		}, "lets other users replace"},
		"shared as /tmp is": {func(t *testing.T, above string) {
			if err := os.Chmod(above, 0o777|os.ModeSticky); err != nil {
				t.Fatal(err)
			}
		}, ""},
		"writable by the own group": {func(t *testing.T, above string) {
			if err := os.Chmod(above, 0o775); err != nil {
				t.Fatal(err)
			}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			above := filepath.Join(shortDir(t), "a")
			if err := os.Mkdir(above, 0o755); err != nil {
				t.Fatal(err)
			}
			tc.arrange(t, above)
			lis, err := unixsock.Listen(filepath.Join(above, "b", "c", "api.sock"), unixsock.Public)
			if err == nil {
				lis.Close()
			}
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Listen() = %v; want an error that says %q", err, tc.want)
			}
			if _, err := os.Stat(filepath.Join(above, "b")); tc.want != "" && err == nil {
				t.Error("a directory was made in a place that was refused")
			}
		})
	}
}

func TestPrivateSocketRefusesReadableDirectory(t *testing.T) {
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := unixsock.Listen(filepath.Join(dir, "admin.sock"), unixsock.Private); err == nil {
		t.Fatal("a directory that the group can enter was accepted")
	}
}

func TestSharedSocketOpensItsPrivateDirectory(t *testing.T) {
	dir := filepath.Join(shortDir(t), "admin")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lis, err := unixsock.Listen(filepath.Join(dir, "admin.sock"), unixsock.Shared)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	fi, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := fi.Mode().Perm(); got != 0o711 {
		t.Errorf("mode of the directory = %04o; want 0711", got)
	}
}

func TestListenRefusesLongPath(t *testing.T) {
	path := "/tmp/" + strings.Repeat("x", unixsock.MaxPath)
	_, err := unixsock.Listen(path, unixsock.Private)
	if err == nil || !strings.Contains(err.Error(), "socket path at most 107") {
		t.Fatalf("error = %v; want the limit", err)
	}
}

// DirOwner names a user only where nobody else could have put the socket.
func TestDirOwner(t *testing.T) {
	path := filepath.Join(shortDir(t), "api.sock")
	uid, ok := unixsock.DirOwner(path)
	if !ok || int(uid) != os.Geteuid() {
		t.Errorf("DirOwner = %d, %v; want %d", uid, ok, os.Geteuid())
	}
	if err := os.Chmod(filepath.Dir(path), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, ok := unixsock.DirOwner(path); ok {
		t.Error("a directory that others can write names an owner")
	}
	if _, ok := unixsock.DirOwner(filepath.Join(filepath.Dir(path), "none", "api.sock")); ok {
		t.Error("a missing directory names an owner")
	}
}

func TestListenReplacesDeadSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "api.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	lis, err := unixsock.Listen(path, unixsock.Private)
	if err != nil {
		t.Fatal(err)
	}
	lis.Close()
}

// A pinned peer that has died is dead, whatever happens to its PID.
func TestPeerDiesWithItsProcess(t *testing.T) {
	if os.Getenv("UNIXSOCK_CONNECT") != "" {
		connectAndWait()
		return
	}
	path := filepath.Join(shortDir(t), "api.sock")
	lis, err := unixsock.Listen(path, unixsock.Private)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPeerDiesWithItsProcess$")
	child.Env = append(os.Environ(), "UNIXSOCK_CONNECT="+path)
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := lis.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	peer, err := unixsock.PeerOf(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if int(peer.PID) != child.Process.Pid || int(peer.UID) != os.Getuid() {
		t.Errorf("peer = pid %d uid %d; want pid %d uid %d", peer.PID, peer.UID, child.Process.Pid, os.Getuid())
	}
	if !peer.Alive() {
		t.Error("a running peer is not alive")
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	child.Wait()
	if peer.Alive() {
		t.Error("a dead peer is alive")
	}
}

// connectAndWait is the child's part: connect, then live until killed.
func connectAndWait() {
	conn, err := net.Dial("unix", os.Getenv("UNIXSOCK_CONNECT"))
	if err != nil {
		panic(err)
	}
	defer conn.Close()
	time.Sleep(time.Minute)
}

func TestClosedPeerIsNotAlive(t *testing.T) {
	path := filepath.Join(shortDir(t), "api.sock")
	lis, err := unixsock.Listen(path, unixsock.Private)
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	client, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	peer, err := unixsock.PeerOf(client)
	if err != nil {
		t.Fatal(err)
	}
	peer.Close()
	peer.Close()
	if peer.Alive() {
		t.Error("a closed peer is alive")
	}
}

// serveHealth serves gRPC health on a socket and returns its path.
func serveHealth(t *testing.T, intercept grpc.UnaryServerInterceptor) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "api.sock")
	lis, err := unixsock.Listen(path, unixsock.Private)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.Creds(unixsock.ServerCredentials()), grpc.UnaryInterceptor(intercept))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	go srv.Serve(lis)
	t.Cleanup(srv.Stop)
	return path
}

func call(t *testing.T, path string, creds credentials.TransportCredentials) error {
	t.Helper()
	cc, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	_, err = healthpb.NewHealthClient(cc).Check(t.Context(), &healthpb.HealthCheckRequest{})
	return err
}

func TestServerLearnsWhoCalls(t *testing.T) {
	var pid int32
	path := serveHealth(t, func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if p, ok := unixsock.PeerFromContext(ctx); ok && p.Alive() {
			pid = p.PID
		}
		return next(ctx, req)
	})
	if err := call(t, path, unixsock.ClientCredentials()); err != nil {
		t.Fatal(err)
	}
	if int(pid) != os.Getpid() {
		t.Errorf("caller's pid = %d; want %d", pid, os.Getpid())
	}
}

// T49: a client does not talk to a socket that another user serves.
func TestClientRefusesForeignServer(t *testing.T) {
	if os.Getenv("UNIXSOCK_SERVE") != "" {
		serveAs(os.Getenv("UNIXSOCK_SERVE"))
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to run a server as another user")
	}
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "api.sock")
	child := asUser(t, 12345, "-test.run=^TestClientRefusesForeignServer$", "UNIXSOCK_SERVE="+path)
	waitFor(t, path)
	err := call(t, path, unixsock.ClientCredentials())
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "uid 12345, which is not trusted") {
		t.Errorf("error = %v; want a refusal that names uid 12345", err)
	}
	if err := call(t, path, unixsock.ClientCredentials(12345)); err != nil {
		t.Errorf("a named uid was refused: %v", err)
	}
	child.Process.Kill()
}

// A socket that another process opened is held to what Listen keeps to, and stays
// when it is closed.
func TestAdoptedSocketIsJudged(t *testing.T) {
	for mode, ok := range map[os.FileMode]bool{0o755: true, 0o777: false, 0o775: false} {
		dir := filepath.Join(shortDir(t), "s")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "a.sock")
		lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := unixsock.Adopt(lis, unixsock.Public); (err == nil) != ok {
			t.Errorf("mode %04o: Adopt = %v", mode, err)
		}
		lis.Close()
		if _, err := os.Lstat(path); (err == nil) != ok {
			t.Errorf("mode %04o: after Close the socket is there: %v", mode, err == nil)
		}
	}
	above := filepath.Join(shortDir(t), "above")
	path := filepath.Join(above, "s", "a.sock")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	if err := os.Chmod(above, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := unixsock.Adopt(lis, unixsock.Public); err == nil {
		t.Error("a socket below a directory that others can write was taken")
	}
}

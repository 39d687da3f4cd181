// Sockets that the service manager passed.

package agent

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"merlon.dev/sdk/systemd"
	"merlon.dev/sdk/unixsock"
)

// One that lies where others could put their own is not served on.
func TestPassedSocketInAnOpenFolderIsRefused(t *testing.T) {
	dir, err := os.MkdirTemp("", "ma") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, tt := range map[string]struct {
		mode os.FileMode
		ok   bool
	}{"closed": {0o755, true}, "open": {0o777, false}} {
		path := filepath.Join(dir, name, "api.sock")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Dir(path), tt.mode); err != nil {
			t.Fatal(err)
		}
		passed, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer passed.Close()
		lis, err := listen(path, unixsock.Public, systemd.Sockets{path: passed})
		if (err == nil) != tt.ok || tt.ok && lis != net.Listener(passed) {
			t.Errorf("listen() in the folder that is %s = %v, %v; want the passed socket taken: %v", name, lis, err, tt.ok)
		}
		if conn, err := net.Dial("unix", path); (err == nil) != tt.ok {
			t.Errorf("the socket in the folder that is %s answers: %v; want %v", name, err == nil, tt.ok)
		} else if err == nil {
			conn.Close()
		}
	}
}

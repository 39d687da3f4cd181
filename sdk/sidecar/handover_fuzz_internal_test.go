// Bytes of the sidecar before: the names that come with its sockets.

package sidecar

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// openFiles is how many files this process has open.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// handed is what a successor makes of text and sockets that came with it.
func handed(t *testing.T, text []byte, fds ...int) (*predecessor, error) {
	t.Helper()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "pair")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = conn.(*net.UnixConn)
	}
	defer ends[0].Close()
	var rights []byte
	if len(fds) > 0 {
		rights = syscall.UnixRights(fds...)
	}
	if _, _, err := ends[0].WriteMsgUnix(text, rights, nil); err != nil {
		t.Fatal(err)
	}
	p := &predecessor{conn: ends[1], sockets: map[string]net.Listener{}}
	return p, p.receive()
}

// listening is a socket that listens, and one file that is none.
func listening(t testing.TB) (lis int, file int) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	return int(f.Fd()), int(null.Fd())
}

// Whatever names come, each socket has one of them or none is taken, and no file is
// left open that nobody has.
func FuzzReceive(f *testing.F) {
	for _, text := range []string{`["a"]`, `["a","b"]`, `["a","a"]`, `[]`, `null`, `{}`, `["a",null]`, `x`} {
		f.Add([]byte(text), uint8(1), false)
		f.Add([]byte(text), uint8(2), false)
	}
	f.Add([]byte(`["a","b"]`), uint8(1), true)
	f.Add([]byte(`["a"]`), uint8(0), false)
	lis, file := listening(f)
	f.Fuzz(func(t *testing.T, text []byte, sockets uint8, withFile bool) {
		if len(text) == 0 || len(text) > maxHandoverBytes {
			return
		}
		var fds []int
		for range sockets % 4 {
			fds = append(fds, lis)
		}
		if withFile {
			fds = append(fds, file)
		}
		before := openFiles(t)
		p, err := handed(t, text, fds...)
		var names []string
		wanted := json.Unmarshal(text, &names) == nil && len(names) == len(fds) && len(fds) > 0 && !withFile
		slices.Sort(names)
		wanted = wanted && len(slices.Compact(names)) == len(fds)
		if (err == nil) != wanted {
			t.Errorf("%q with %d sockets, a file %v: %v", text, sockets%4, withFile, err)
		}
		if err == nil && len(p.sockets) != len(fds) {
			t.Errorf("%d of %d sockets are known by name", len(p.sockets), len(fds))
		}
		p.close()
		after := openFiles(t) // others' may end meanwhile, or a little later
		for end := time.Now().Add(10 * time.Second); after > before && time.Now().Before(end); after = openFiles(t) {
			time.Sleep(time.Millisecond)
		}
		if after > before {
			t.Errorf("%q: %d files are open; before there were %d", text, after, before)
		}
	})
}

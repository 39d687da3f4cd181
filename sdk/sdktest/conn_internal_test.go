// Connections in memory keep to what net.Conn promises.

package sdktest

import (
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"golang.org/x/net/nettest"
)

func TestConnectionsInMemoryAreNetConns(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b := pipe(address{"tcp", "a:1"}, address{"tcp", "b:2"})
		return a, b, func() { a.Close(); b.Close() }, nil
	})
}

func TestCloseKeepsWhatWasSentAndAResetDoesNot(t *testing.T) {
	for name, tc := range map[string]struct {
		reset bool
		want  string
		err   error
	}{
		"close": {false, "hello", nil},
		"reset": {true, "", syscall.ECONNRESET},
	} {
		a, b := pipe(address{"tcp", "a:1"}, address{"tcp", "b:2"})
		if _, err := io.WriteString(a, "hello"); err != nil {
			t.Fatal(err)
		}
		if tc.reset {
			a.SetLinger(0)
		}
		a.Close()
		if got, err := io.ReadAll(b); string(got) != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("after a %s: %q, %v; want %q, %v", name, got, err, tc.want, tc.err)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("write after a %s: %v", name, err)
		}
		b.Close()
	}
}

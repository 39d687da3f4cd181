// The wrapped connections do what those of the net package do, over TCP and Unix
// sockets.

package sock_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"merlon.dev/sdk/sidecar/internal/sock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// each runs f with both ends of a connection of each kind, wrapped.
func each(t *testing.T, f func(t *testing.T, a, b net.Conn)) {
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "s")} {
		t.Run(network, func(t *testing.T) {
			lis, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer lis.Close()
			a, err := net.Dial(network, lis.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			b, err := lis.Accept()
			if err != nil {
				t.Fatal(err)
			}
			a, b = sock.New(a), sock.New(b)
			t.Cleanup(func() { a.Close(); b.Close() })
			f(t, a, b)
		})
	}
}

func TestAllArrivesInOrder(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		sent := make([]byte, 5<<20) // more than the kernel keeps, so that the writer waits
		rand.Read(sent)
		errs := make(chan error, 1)
		go func() {
			_, err := a.Write(sent)
			errs <- errors.Join(err, a.(*sock.Conn).CloseWrite())
		}()
		got, err := io.ReadAll(b)
		if err = errors.Join(err, <-errs); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes arrived of %d, err %v", len(got), len(sent), err)
		}
		if n, err := b.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("after the end: %d, %v; want EOF", n, err)
		}
		if n, err := b.Read(nil); n != 0 || err != nil {
			t.Errorf("nothing is read without an error; got %d, %v", n, err)
		}
	})
}

func TestWritersDoNotMix(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		const writers, times, size = 4, 20, 1 << 10
		var all sync.WaitGroup
		for i := range writers {
			all.Go(func() {
				for range times {
					if _, err := a.Write(bytes.Repeat([]byte{byte(i)}, size)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		go func() { all.Wait(); a.Close() }()
		got, err := io.ReadAll(b)
		all.Wait()
		if err != nil || len(got) != writers*times*size {
			t.Fatalf("%d bytes, err %v", len(got), err)
		}
	})
}

func TestDeadlineAndCloseEndWaiting(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		a.SetReadDeadline(time.Unix(1, 0))
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read after the deadline: %v", err)
		}
		a.SetReadDeadline(time.Time{})
		errs := make(chan error, 2)
		go func() { _, err := a.Read(make([]byte, 1)); errs <- err }()
		go func() { _, err := a.Write(make([]byte, 16<<20)); errs <- err }()
		b.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := b.Read(make([]byte, 1)); err != nil { // the writer is under way
			t.Fatal(err)
		}
		a.Close()
		for range 2 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("who waits for a closed connection gets %v", err)
			}
		}
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after Close: %v", err)
		}
	})
}

func TestCloseIsToldOnce(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		var told [3]int
		a.(*sock.Conn).OnClose(func() { told[0]++ })
		a.(*sock.Conn).OnClose(func() { told[1]++ })
		b.Close() // the other end is another matter
		if told[1] != 0 {
			t.Error("told of the other end")
		}
		a.Close()
		a.Close()
		a.(*sock.Conn).OnClose(func() { told[2]++ })
		if told != [3]int{0, 1, 1} {
			t.Errorf("told %v times; want the last one once, and who comes late at once", told)
		}
	})
}

func TestErrorsOfTheKernelAreTold(t *testing.T) {
	each(t, func(t *testing.T, a, b net.Conn) {
		if err := b.(*sock.Conn).SetLinger(0); err != nil {
			t.Fatal(err)
		}
		b.Close()
		_, err := a.Read(make([]byte, 1))
		want := error(syscall.ECONNRESET)
		if a.RemoteAddr().Network() == "unix" {
			want = io.EOF
		}
		if !errors.Is(err, want) {
			t.Errorf("read from a connection that was reset: %v; want %v", err, want)
		}
		for range 2 { // the first one after a reset may still get away
			_, err = a.Write([]byte("x"))
		}
		if !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write to a connection that was reset: %v", err)
		}
	})
}

func TestOthersAreGivenBack(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if got := sock.New(a); got != a {
		t.Errorf("a pipe became %T", got)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer lis.Close()
	go func() {
		conn, err := lis.Accept()
		if err != nil {
			return
		}
		conn = sock.New(conn)
		defer conn.Close()
		io.CopyBuffer(conn, struct{ io.Reader }{conn}, make([]byte, 128))
	}()
	conn, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	conn = sock.New(conn)
	defer conn.Close()
	buf := make([]byte, 128)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := conn.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			b.Fatal(err)
		}
	}
}

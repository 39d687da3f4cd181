// A crowd of clients in a process of its own, so that a test can have ten thousand of
// them, and kill them: idle connections that are closed, reset or left half open, and
// handshakes that never end.

package sdk_test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"merlon.dev/sdk"
)

// crowdEnv has a crowdSpec in the process of a crowd.
const crowdEnv = "MERLON_CROWD"

// crowdSpec is what a crowd does: to which address it speaks which protocol, with how
// many idle connections and how many handshakes.
type crowdSpec struct {
	Protocol, Address string
	Idle, Slow        int
	Vanish            bool // a quarter of the idle ones end without a packet; only root can
}

// crowd is the process as its parent sees it.
type crowd struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	said *bufio.Reader
}

// startCrowd starts it; it is killed with the test.
func startCrowd(t *testing.T, workload string, spec crowdSpec) *crowd {
	t.Helper()
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), crowdEnv+"="+string(text), sdk.SocketEnv+"="+workload)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &crowd{cmd, in, bufio.NewReader(out)}
	t.Cleanup(c.kill)
	return c
}

// kill ends the process without a word; the kernel ends its connections.
func (c *crowd) kill() {
	_ = c.cmd.Process.Kill() // it may have ended
	_ = c.cmd.Wait()         // by the signal
}

// expect waits for the next thing that it says.
func (c *crowd) expect(t *testing.T, want string) {
	t.Helper()
	if line, err := c.said.ReadString('\n'); err != nil || strings.TrimSpace(line) != want {
		t.Fatalf("the crowd says %q, %v; want %q", line, err, want)
	}
}

// runCrowd is main of such a process, if this is one.
func runCrowd() (itIs bool) {
	text := os.Getenv(crowdEnv)
	if text == "" {
		return false
	}
	var spec crowdSpec
	err := json.Unmarshal([]byte(text), &spec)
	if err == nil {
		err = spec.run(os.Stdin)
	}
	if err != nil {
		fmt.Println("error:", err)
	}
	return true
}

// idleConn is a connection with what is below TLS.
type idleConn struct {
	io.Closer
	raw *net.TCPConn
}

func (s crowdSpec) run(orders io.Reader) error {
	id, err := sdk.Open(context.Background(), quiet, sdk.WithStartupTimeout(time.Minute))
	if err != nil {
		return err
	}
	conns, err := s.openIdle(id)
	if err != nil {
		return err
	}
	slow, err := s.openSlow()
	if err != nil {
		return err
	}
	fmt.Println("open")
	_, _ = bufio.NewReader(orders).ReadString('\n')
	for i, c := range conns {
		switch i % 4 {
		case 0:
			_ = c.Close()
		case 1:
			err = c.raw.SetLinger(0)
			_ = c.raw.Close()
		case 2:
			err = c.raw.CloseWrite() // half open
		case 3: // until this process is killed
			if s.Vanish {
				err = vanish(c.raw)
			}
		}
		if err != nil {
			return err
		}
	}
	fmt.Println("ended")
	if n := slow(); n > 0 {
		fmt.Println(n, "handshakes go on after a minute")
	}
	fmt.Println("refused")
	_, err = io.Copy(io.Discard, orders)
	return err
}

// vanish forgets a connection, of which the other end hears nothing, as when a machine
// loses its power.
func vanish(conn *net.TCPConn) error {
	const tcpRepair = 19 // linux/tcp.h: closed in this state, a socket says nothing
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) { setErr = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpRepair, 1) })
	if err = cmp.Or(err, setErr); err != nil {
		return fmt.Errorf("let a connection vanish: %w", err)
	}
	return conn.Close()
}

func (s crowdSpec) openIdle(id *sdk.Identity) ([]idleConn, error) {
	conns, errs := make([]idleConn, s.Idle), make([]error, s.Idle)
	next := make(chan int)
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for i := range next {
				conns[i], errs[i] = s.open(id)
			}
		})
	}
	for i := range s.Idle {
		next <- i
	}
	close(next)
	workers.Wait()
	return conns, cmp.Or(errs...)
}

// open makes a connection and uses it once, as far as it shows that the server has it.
func (s crowdSpec) open(id *sdk.Identity) (idleConn, error) {
	raw, err := net.Dial("tcp", s.Address)
	if err != nil {
		return idleConn{}, err
	}
	alpn := map[string][]string{"http/1.1": {"http/1.1"}, "h2": {"h2"}, "grpc": {"h2"}}[s.Protocol]
	conn, err := id.ClientHandshake(context.Background(), raw, sdk.Service("orders"), "", alpn...)
	if err != nil {
		return idleConn{}, err
	}
	switch s.Protocol {
	case "http/1.1":
		_, err = io.WriteString(conn, "HEAD / HTTP/1.1\r\nHost: orders\r\n\r\n")
		if answer := make([]byte, len("HTTP/1.1 200")); err == nil {
			if _, err = io.ReadFull(conn, answer); err == nil && string(answer) != "HTTP/1.1 200" {
				err = errors.New(string(answer))
			}
		}
	case "h2", "grpc":
		_, err = io.WriteString(conn, http2.ClientPreface)
		if framer := http2.NewFramer(conn, conn); err == nil {
			if err = framer.WriteSettings(); err == nil {
				_, err = framer.ReadFrame()
			}
		}
	default:
		err = say(conn, "hello")
	}
	return idleConn{conn, raw.(*net.TCPConn)}, err
}

// openSlow begins handshakes and sends a byte a second of each, until the server ends
// them, or a minute has passed. wait says how many are left then.
func (s crowdSpec) openSlow() (wait func() int64, err error) {
	const hello = "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
	var left atomic.Int64
	var goroutines sync.WaitGroup
	for range s.Slow {
		conn, err := net.Dial("tcp", s.Address)
		if err != nil {
			return nil, err
		}
		left.Add(1)
		goroutines.Go(func() {
			defer conn.Close()
			for second := range 60 {
				_, err := io.WriteString(conn, hello[second%len(hello):][:1])
				if err == nil {
					_ = conn.SetReadDeadline(time.Now().Add(time.Second)) // else Read fails
					_, err = conn.Read(make([]byte, 1))
				}
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					left.Add(-1)
					return
				}
			}
		})
	}
	return func() int64 { goroutines.Wait(); return left.Load() }, nil
}

// Whoever connects, what the process itself opens can still be opened.

package files_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"merlon.dev/ca/internal/files"
)

func TestConnectionsDoNotGetTheLastDescriptors(t *testing.T) {
	var said bytes.Buffer
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const keep, room = 16, 4
	lis := files.Keep(inner, keep, slog.New(slog.NewTextHandler(&said, nil)))
	var accepted []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			accepted = append(accepted, conn)
		}
	}()
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	lowest, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	few := syscall.Rlimit{Cur: uint64(lowest.Fd()) + keep + 2*room, Max: before.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before)
	// Both ends are in this process, so each connection takes two until it is refused.
	refused := 0
	var dialed []net.Conn
	for range 4 * room {
		conn, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatalf("connection %d: %v", len(dialed), err)
		}
		dialed = append(dialed, conn)
		conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := conn.Read(make([]byte, 1)); err == io.EOF { //nolint:errorlint // net gives it as it is
			refused++
			conn.Close()
		}
	}
	for i := range keep - room {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatalf("file %d of the process itself: %v", i, err)
		}
		defer f.Close()
	}
	lis.Close()
	<-done
	if refused == 0 || len(accepted) == 0 {
		t.Errorf("%d connections were accepted and %d refused; want both", len(accepted), refused)
	}
	if !strings.Contains(said.String(), "LimitNOFILE") || strings.Count(said.String(), "\n") != 1 {
		t.Errorf("log:\n%s\nwant one line that says what to do", said.String())
	}
	for _, conn := range append(accepted, dialed...) {
		conn.Close()
	}
}

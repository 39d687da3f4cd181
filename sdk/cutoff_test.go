// P12: how long bytes still flow after a revocation, on many streams at once. The
// reading ends are in a process of their own.

package sdk_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"merlon.dev/integration/measure"
	"merlon.dev/sdk"
	"merlon.dev/sdk/sdktest"
)

// streamsEnv has the address to which the process of the reading ends connects, and
// streamsNumber how many there are.
const (
	streamsEnv    = "MERLON_STREAMS_ADDRESS"
	streamsNumber = "MERLON_STREAMS"
)

// beat is how often a stream carries a byte.
const beat = 500 * time.Millisecond

// A revocation ends every stream of the revoked peer, and none of another. With
// MERLON_STREAMS=10000 (make cutoff) it says how long that takes.
func TestRevocationEndsEveryStream(t *testing.T) {
	n, err := strconv.Atoi(os.Getenv(streamsNumber))
	if err != nil {
		n = 200
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Cur < uint64(n)+200 {
		t.Fatalf("%d streams need as many open files and 200 more, and the limit is %d (%v): ulimit -n", n, files.Cur, err)
	}
	td := sdktest.New(t)
	td.Allow("web", "orders")
	td.Allow("cart", "orders")
	td.CompilePolicy()
	orders, cart := td.Workload("orders", quiet), td.Workload("cart", quiet)
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lis := orders.Listener(inner)
	var beating sync.WaitGroup
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			beating.Go(func() { beats(conn) })
		}
	}()
	t.Cleanup(func() { lis.Close(); orders.Close(); beating.Wait() })
	other, err := cart.DialTLS(sdk.Service("orders"))(t.Context(), "tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()

	ends := readingEnds(t, td.Address("web"), inner.Addr().String(), n)
	if live := orders.LiveConns(); live != int64(n)+1 {
		t.Fatalf("%d connections; want %d", live, n+1)
	}
	pushed, before := time.Now(), measure.CPU()
	td.Revoke("web")
	for orders.LiveConns() > 1 && time.Since(pushed) < time.Minute {
		time.Sleep(time.Millisecond)
	}
	cut, spent := time.Since(pushed), measure.CPU()-before
	last, ended := ends()
	if len(last) != n {
		t.Errorf("%d streams have ended; want %d", len(last), n)
	}
	for range 3 { // of another, a byte and more
		if _, err := io.ReadFull(other, make([]byte, 1)); err != nil {
			t.Fatalf("the stream of another: %v", err)
		}
	}
	p := func(at []time.Time, q float64) time.Duration {
		slices.SortFunc(at, time.Time.Compare)
		return max(0, at[min(len(at)-1, int(q*float64(len(at))))].Sub(pushed))
	}
	t.Logf("%d streams: all cut %v after the push, with %v of CPU here; last byte p50 %v, p99 %v, max %v; end seen p50 %v, p99 %v, max %v", n, cut, spent,
		p(last, 0.5), p(last, 0.99), p(last, 1), p(ended, 0.5), p(ended, 0.99), p(ended, 1))
	measure.Print(fmt.Sprintf("Cutoff/streams=%d", n), map[string]float64{
		"last-byte-p99-ms": p(last, 0.99).Seconds() * 1000, "last-byte-max-ms": p(last, 1).Seconds() * 1000, "cpu-s": spent.Seconds(),
	})
}

// beats sends bytes until the connection ends, no two streams at the same moment.
func beats(conn net.Conn) {
	defer conn.Close()
	time.Sleep(rand.N(beat))
	for {
		if _, err := conn.Write([]byte("x")); err != nil {
			return
		}
		time.Sleep(beat)
	}
}

// readingEnds starts n of them and returns when all read. wait gives when each read its
// last byte, and when it saw the end.
func readingEnds(t *testing.T, workload, address string, n int) (wait func() (last, ended []time.Time)) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), streamsEnv+"="+address, streamsNumber+"="+strconv.Itoa(n), sdk.SocketEnv+"="+workload)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // by the signal
	})
	said := bufio.NewReader(out)
	if line, err := said.ReadString('\n'); line != "open\n" {
		t.Fatalf("the reading ends say %q, %v", line, err)
	}
	return func() (last, ended []time.Time) {
		t.Helper()
		defer time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }).Stop() // some stream goes on
		var all [2][]int64
		if err := json.NewDecoder(said).Decode(&all); err != nil {
			t.Fatal(err)
		}
		for _, at := range all[0] {
			last = append(last, time.Unix(0, at))
		}
		for _, at := range all[1] {
			ended = append(ended, time.Unix(0, at))
		}
		return last, ended
	}
}

// runReadingEnds is main of their process, if this is it.
func runReadingEnds() (itIs bool) {
	address := os.Getenv(streamsEnv)
	if address == "" {
		return false
	}
	n, err := strconv.Atoi(os.Getenv(streamsNumber))
	if err == nil {
		err = readAll(address, n)
	}
	if err != nil {
		fmt.Println("error:", err)
	}
	return true
}

// readAll opens n connections, reads until each ends, and says when that was.
func readAll(address string, n int) error {
	id, err := sdk.Open(context.Background(), quiet, sdk.WithStartupTimeout(time.Minute))
	if err != nil {
		return err
	}
	dial := id.DialTLS(sdk.Service("orders"))
	at := [2][]int64{make([]int64, n), make([]int64, n)}
	var failed atomic.Pointer[error]
	var begun, over sync.WaitGroup
	begun.Add(n)
	free := make(chan struct{}, 16) // handshakes at a time
	for i := range n {
		over.Go(func() {
			free <- struct{}{}
			conn, err := dial(context.Background(), "tcp", address)
			<-free
			one := make([]byte, 1)
			if err == nil {
				defer conn.Close()
				_, err = io.ReadFull(conn, one)
			}
			if err != nil {
				failed.Store(&err)
			}
			begun.Done()
			for err == nil {
				at[0][i] = time.Now().UnixNano()
				_, err = io.ReadFull(conn, one)
			}
			at[1][i] = time.Now().UnixNano()
		})
	}
	begun.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	fmt.Println("open")
	over.Wait()
	return json.NewEncoder(os.Stdout).Encode(at)
}

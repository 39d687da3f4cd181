// P9 and P10: what a pair of sidecars costs, a decision and a record for each request
// included, beside the other pairs, in turn with them: one table of loads, each for all
// pairs that carry it.

package bench_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"

	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

// BenchmarkSidecarPair reports for each load and pair the CPU of its two processes for each
// request (NAME-own-µs), what is served a second (NAME-per-s) and the memory of the larger
// of the two (NAME-MiB).
func BenchmarkSidecarPair(b *testing.B) {
	slog.SetDefault(slog.New(slog.DiscardHandler))
	for _, protocol := range []string{carriesHTTP, carriesGRPC, carriesTCP} {
		b.Run(protocol, func(b *testing.B) {
			s := newSite(b)
			app := plainApp
			if protocol == carriesGRPC {
				app = unaryApp
			}
			all := s.pairs(protocol, app(b))
			for _, l := range loads {
				for _, at := range l.at[protocol] {
					b.Run(fmt.Sprintf("%s/at-once=%d", l.name, at), func(b *testing.B) { l.measure(b, all, at) })
				}
			}
		})
	}
}

// load is what callers do.
type load struct {
	name string
	at   map[string][]int // by protocol: how many at the same time
	ops  int              // of each of them, each time
	// caller is one of them, and what it does once.
	caller func(b *testing.B, p pair) func() error
	// but is a pair that does not carry it.
	but string
}

var (
	some = []int{1, 16, 64}
	four = []int{4}
)

var loads = []load{
	{name: "100-bytes", at: map[string][]int{carriesHTTP: some, carriesTCP: some}, ops: 40, caller: keptConnection(get)},
	{name: "16-bytes", at: map[string][]int{carriesGRPC: some}, ops: 40, caller: rpcs(16)},
	{name: "1-MiB", at: map[string][]int{carriesHTTP: four, carriesTCP: four}, ops: 10, caller: keptConnection(post)},
	// HAProxy 2.6 breaks some of these calls off.
	{name: "1-MiB-both-ways", at: map[string][]int{carriesGRPC: four}, ops: 10, caller: rpcs(1 << 20), but: "haproxy"},
	{name: "new-connections", at: map[string][]int{carriesHTTP: {16}, carriesTCP: {16}}, ops: 10, caller: newConnections},
}

// measure has the pairs carry the load in turn.
func (l load) measure(b *testing.B, all []pair, at int) {
	b.Helper()
	var variants []measure.Variant
	took, served := map[string]time.Duration{}, map[string]int{}
	for _, p := range all {
		if p.name == l.but {
			continue
		}
		var once []func() error
		for range at {
			once = append(once, l.caller(b, p))
		}
		stage.Eventually(b, p.name+" serves", once[0])
		variants = append(variants, measure.Variant{Name: p.name, Ops: l.ops * at, Processes: p.pids, Run: func() error {
			begun := time.Now()
			err := together(once, l.ops)
			took[p.name] += time.Since(begun)
			served[p.name] += l.ops * at
			return err
		}})
	}
	measure.Interleaved(b, max(1, 16/at), variants...)
	for _, v := range variants {
		b.ReportMetric(float64(served[v.Name])/took[v.Name].Seconds(), v.Name+"-per-s")
		outbound, _ := measure.MemoryOf(b, v.Processes[0])
		inbound, _ := measure.MemoryOf(b, v.Processes[1])
		b.ReportMetric(float64(max(outbound, inbound))/(1<<20), v.Name+"-MiB")
	}
}

// together has all callers do it n times over.
func together(all []func() error, n int) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, once := range all {
		wg.Go(func() {
			for range n {
				if errs[i] = once(); errs[i] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

const head = " /orders/17 HTTP/1.1\r\nHost: orders\r\nUser-Agent: bench\r\nAccept: */*\r\nX-Request-Id: 0123456789abcdef\r\n"

var (
	get  = []byte("GET" + head + "\r\n")
	post = append([]byte("POST"+head+"Content-Length: 1048576\r\n\r\n"), make([]byte, 1<<20)...)
)

// keptConnection makes callers that keep a connection and make requests of HTTP/1.1
// over it.
func keptConnection(request []byte) func(*testing.B, pair) func() error {
	return func(b *testing.B, p pair) func() error {
		var c *caller
		b.Cleanup(func() {
			if c != nil {
				c.conn.Close()
			}
		})
		return func() (err error) {
			if c == nil {
				if c, err = newCaller(p.entry); err != nil {
					return err
				}
			}
			if err = c.call(request); err != nil {
				c.conn.Close()
				c = nil
			}
			return err
		}
	}
}

// newConnections makes callers that connect anew for each request.
func newConnections(_ *testing.B, p pair) func() error {
	return func() error {
		c, err := newCaller(p.entry)
		if err != nil {
			return err
		}
		defer c.conn.Close()
		return c.call(get)
	}
}

// rpcs makes callers of one client, with a connection each where there are few.
func rpcs(size int) func(*testing.B, pair) func() error {
	req := &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: []byte(strings.Repeat("x", size))}}
	var mu sync.Mutex
	clients := map[string]testgrpc.TestServiceClient{}
	return func(b *testing.B, p pair) func() error {
		mu.Lock()
		defer mu.Unlock()
		if clients[p.entry] == nil {
			conn, err := grpc.NewClient("passthrough:///"+p.entry, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				b.Fatal(err)
			}
			clients[p.entry] = testgrpc.NewTestServiceClient(conn)
			b.Cleanup(func() {
				conn.Close()
				delete(clients, p.entry)
			})
		}
		c := clients[p.entry]
		return func() error {
			_, err := c.UnaryCall(context.Background(), req)
			return err
		}
	}
}

type echoes struct {
	testgrpc.UnimplementedTestServiceServer
}

func (echoes) UnaryCall(_ context.Context, req *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return &testgrpc.SimpleResponse{Payload: req.GetPayload()}, nil
}

// unaryApp is a gRPC server without TLS.
func unaryApp(b *testing.B) (address string) {
	lis := listenLocal(b)
	srv := grpc.NewServer()
	testgrpc.RegisterTestServiceServer(srv, echoes{})
	go srv.Serve(lis)
	b.Cleanup(srv.Stop)
	return lis.Addr().String()
}

func listenLocal(b *testing.B) net.Listener {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { lis.Close() })
	return lis
}

// plainApp answers each request of HTTP/1.1 with 100 bytes; it reads bodies.
func plainApp(b *testing.B) (address string) {
	lis := listenLocal(b)
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 100\r\n\r\n" + strings.Repeat("x", 100))
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for r := bufio.NewReaderSize(conn, 64<<10); ; {
					if skipMessage(r) != nil {
						return
					}
					if _, err := conn.Write(answer); err != nil {
						return
					}
				}
			}()
		}
	}()
	return lis.Addr().String()
}

// skipMessage reads a head and the body that its Content-Length announces.
func skipMessage(r *bufio.Reader) error {
	length := 0
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) == 2 {
			_, err := r.Discard(length)
			return err
		}
		if name, value, ok := bytes.Cut(line, []byte(": ")); ok && strings.EqualFold(string(name), "content-length") {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return err
			}
		}
	}
}

// caller keeps one connection and makes requests of HTTP/1.1 over it.
type caller struct {
	conn net.Conn
	r    *bufio.Reader
}

func newCaller(address string) (*caller, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	return &caller{conn, bufio.NewReaderSize(conn, 4<<10)}, nil
}

func (c *caller) call(request []byte) error {
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	status, err := c.r.Peek(len("HTTP/1.1 200"))
	if err != nil {
		return err
	}
	if string(status) != "HTTP/1.1 200" {
		rest, _ := io.ReadAll(io.LimitReader(c.r, 1<<10))
		return fmt.Errorf("answer: %s", rest)
	}
	return skipMessage(c.r)
}

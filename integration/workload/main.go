// Command workload is a process that calls the Workload API as it is told: a
// command a line on stdin, an answer a line on stdout. The integration tests run
// it as other users, let it become another program or user, and stop it.
//
//	open             open a stream of X509-SVIDs: its first answer
//	next             the next answer on that stream
//	streams N        open N further streams at once: how many got an answer
//	jwt FIRST LAST   a JWT-SVID for each audience FIRST … LAST, 32 at a time, until
//	                 one is refused: how many were made
//	setuid UID       go on as another user
//	exec PROGRAM     become another program, which keeps the connection
//
// An answer is "svids PATH…", or "error CODE REASON". Started as `workload drain
// FD` it prints what comes on a connection that it was left, until it ends.
// Started as `workload connect SOCKET` it connects the socket that is its file
// descriptor 3, says so, and waits until stdin ends.
package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "workload: error:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "drain":
		return drain(args[1])
	case len(args) == 2 && args[0] == "connect":
		return connect(args[1])
	case len(args) == 0:
		return obey()
	}
	return fmt.Errorf("usage: workload [drain FD | connect SOCKET]")
}

// connect is as little as a process can do to be a peer.
func connect(path string) error {
	if err := syscall.Connect(3, &syscall.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	fmt.Println("connected")
	_, err := bufio.NewReader(os.Stdin).ReadByte()
	_ = err // whatever ends stdin ends this
	return nil
}

// drain prints everything that comes, quoted, a line for each read.
func drain(arg string) error {
	fd, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	// The program before left it non-blocking.
	if err := syscall.SetNonblock(fd, false); err != nil {
		return err
	}
	fmt.Println("drains")
	buf := make([]byte, 64<<10)
	for {
		n, err := syscall.Read(fd, buf)
		if err == syscall.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			fmt.Println("end")
			return nil
		}
		fmt.Println(strconv.Quote(string(buf[:n])))
	}
}

// process is the workload: one connection, and at most one stream that it reads.
type process struct {
	api    workloadpb.SpiffeWorkloadAPIClient
	ctx    context.Context
	fd     int // of the connection, once there is one
	stream grpc.ServerStreamingClient[workloadpb.X509SVIDResponse]
}

func obey() error {
	p := &process{ctx: metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true")}
	endpoint, err := url.Parse(os.Getenv("SPIFFE_ENDPOINT_SOCKET"))
	if err != nil {
		return err
	}
	cc, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.dial(ctx, endpoint.Path) }))
	if err != nil {
		return err
	}
	defer cc.Close()
	p.api = workloadpb.NewSpiffeWorkloadAPIClient(cc)
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		answer, err := p.do(strings.Fields(lines.Text()))
		if err != nil {
			return err
		}
		fmt.Println(answer)
	}
	return lines.Err()
}

func (p *process) dial(ctx context.Context, path string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	return conn, raw.Control(func(fd uintptr) { p.fd = int(fd) })
}

func (p *process) do(command []string) (string, error) {
	switch {
	case len(command) == 1 && command[0] == "open":
		var err error
		if p.stream, err = p.api.FetchX509SVID(p.ctx, &workloadpb.X509SVIDRequest{}); err != nil {
			return failed(err), nil
		}
		return p.next(), nil
	case len(command) == 1 && command[0] == "next" && p.stream != nil:
		return p.next(), nil
	case len(command) == 2 && command[0] == "streams":
		n, err := strconv.Atoi(command[1])
		return p.streams(n), err
	case len(command) == 3 && command[0] == "jwt":
		first, err := strconv.Atoi(command[1])
		if err != nil {
			return "", err
		}
		last, err := strconv.Atoi(command[2])
		return p.jwt(first, last), err
	case len(command) == 2 && command[0] == "setuid":
		uid, err := strconv.Atoi(command[1])
		if err != nil {
			return "", err
		}
		return "done", syscall.Setresuid(uid, uid, uid) // all threads
	case len(command) == 2 && command[0] == "exec":
		if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(p.fd), syscall.F_SETFD, 0); errno != 0 {
			return "", errno
		}
		return "", syscall.Exec(command[1], []string{command[1], "drain", strconv.Itoa(p.fd)}, os.Environ())
	}
	return "", fmt.Errorf("unknown command %q", command)
}

func (p *process) next() string {
	m, err := p.stream.Recv()
	if err != nil {
		return failed(err)
	}
	answer := []string{"svids"}
	for _, s := range m.GetSvids() {
		id, err := url.Parse(s.GetSpiffeId())
		if err != nil {
			return "error " + strconv.Quote(err.Error())
		}
		answer = append(answer, id.Path)
	}
	return strings.Join(answer, " ")
}

// streams opens n streams that are never read again, and says how many of them
// got a first answer, and how the last of the others was refused.
func (p *process) streams(n int) string {
	results := make(chan error, n)
	for range n {
		go func() {
			stream, err := p.api.FetchX509SVID(p.ctx, &workloadpb.X509SVIDRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			results <- err
		}()
	}
	open, refusal := 0, ""
	for range n {
		if err := <-results; err != nil {
			refusal = failed(err)
		} else {
			open++
		}
	}
	return strings.TrimSpace(fmt.Sprintf("open %d %s", open, refusal))
}

func (p *process) jwt(first, last int) string {
	var next, made atomic.Int64
	var refusal atomic.Pointer[string]
	next.Store(int64(first))
	var callers sync.WaitGroup
	for range 32 {
		callers.Go(func() {
			for i := next.Add(1) - 1; i <= int64(last) && refusal.Load() == nil; i = next.Add(1) - 1 {
				_, err := p.api.FetchJWTSVID(p.ctx, &workloadpb.JWTSVIDRequest{Audience: []string{strconv.FormatInt(i, 10)}})
				if err != nil {
					text := failed(err)
					refusal.Store(&text)
					return
				}
				made.Add(1)
			}
		})
	}
	callers.Wait()
	if text := refusal.Load(); text != nil {
		return fmt.Sprintf("made %d %s", made.Load(), *text)
	}
	return fmt.Sprintf("made %d", made.Load())
}

// failed is how an error is told to a program.
func failed(err error) string {
	answer := []string{"error", status.Code(err).String()}
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			answer = append(answer, info.GetReason())
		}
	}
	return strings.Join(answer, " ")
}

// Command peer is a workload of the fault harness: a service on the SDK that calls
// others without a pause, by new TLS connections, over pooled ones and on streams
// that stay open, and prints what came of each call, a JSON object a line (package
// history). With a line on stdin it stops calling and says "{}"; it ends with stdin.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/faults/history"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

// patience bounds one call.
const patience = 10 * time.Second

// tick is how often a stream brings something.
const tick = 50 * time.Millisecond

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "peer: error:", err)
		os.Exit(1)
	}
}

func run() error {
	own := flag.String("id", "", "the SPIFFE ID of this peer, as operations name it")
	calls := flag.String("call", "", "whom it calls: SPIFFE-ID=HOST:PORT, comma-separated")
	every := flag.Duration("every", 20*time.Millisecond, "how often it calls each of them")
	stranger := flag.Bool("stranger", false, "nobody lets it in: record calls before the first that succeeds, too")
	thief := flag.Bool("thief", false, "call by go-spiffe alone, which keeps what it once had")
	rate := flag.Int("decide", 0, "decide that often a second on calls that the next two say the truth of")
	may := flag.String("may", "", "a SPIFFE ID that may call this peer")
	mayNot := flag.String("may-not", "", "SPIFFE IDs that may not, comma-separated")
	flag.Parse()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	calling, rest := context.WithCancel(ctx)
	go func() { // first all stop calling, then none is needed any more
		told := bufio.NewReader(os.Stdin)
		_, _ = told.ReadString('\n')
		rest()
		_, _ = io.Copy(io.Discard, told)
		cancel()
	}()
	id, err := sdk.Open(ctx, sdk.WithStartupTimeout(time.Minute))
	if err != nil {
		return err
	}
	defer id.Close()
	lis, err := net.FileListener(os.NewFile(3, "listener")) // which nobody can take before
	if err != nil {
		return fmt.Errorf("take over the listener, file descriptor 3: %w", err)
	}
	srv := &http.Server{
		Handler: httpauth.Handler(id, http.HandlerFunc(serve)), TLSConfig: id.ServerTLS(),
		ReadHeaderTimeout: patience, ErrorLog: log.New(io.Discard, "", 0),
	}
	serving := make(chan error, 1)
	go func() { serving <- srv.ServeTLS(lis, "", "") }()
	p := &peer{id: id, own: *own, stranger: *stranger, out: json.NewEncoder(os.Stdout)}
	if *thief {
		if p.kept, err = workloadapi.NewX509Source(ctx); err != nil {
			return err
		}
		defer p.kept.Close()
	}
	var running sync.WaitGroup
	for _, call := range strings.FieldsFunc(*calls, func(r rune) bool { return r == ',' }) {
		to, address, ok := strings.Cut(call, "=")
		if !ok {
			return fmt.Errorf("-call %q: want SPIFFE-ID=HOST:PORT", call)
		}
		target := target{id: to, url: "https://" + address}
		running.Go(func() { p.keepCalling(calling, target, *every) })
	}
	if *rate > 0 {
		running.Go(func() { p.decide(calling, *rate, *may, strings.Split(*mayNot, ",")) })
	}
	running.Wait()
	p.say(history.Op{})
	<-ctx.Done()
	srv.Close()
	if err := <-serving; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// serve answers at once, and on /feed for as long as the caller stays.
func serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/feed" {
		return
	}
	out := http.NewResponseController(w)
	for every := time.NewTicker(tick); ; {
		if _, err := io.WriteString(w, "beat\n"); err != nil || out.Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-every.C:
		}
	}
}

type target struct{ id, url string }

// peer is safe for concurrent use.
type peer struct {
	id       *sdk.Identity
	own      string
	stranger bool
	// kept is what a thief calls with. Nil: by the SDK, which would stop by itself
	// when its identity is withdrawn.
	kept *workloadapi.X509Source

	mu  sync.Mutex
	out *json.Encoder // guarded by mu
}

func (p *peer) say(op history.Op) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.out.Encode(op); err != nil {
		panic(fmt.Sprintf("peer: print an operation: %v", err)) // the parent has gone
	}
}

// keepCalling calls a target until ctx ends. Calls before the first that succeeds are
// of a start that is not over, and are not told, but a stranger's.
func (p *peer) keepCalling(ctx context.Context, to target, every time.Duration) {
	for !p.stranger && ctx.Err() == nil {
		op := p.connect(ctx, to)
		if op.Outcome == history.OK {
			break
		}
		fmt.Fprintf(os.Stderr, "peer: not let in yet: %s\n", op.Detail)
		time.Sleep(every)
	}
	pooled := p.client(to)
	defer pooled.CloseIdleConnections()
	var running sync.WaitGroup
	defer running.Wait()
	repeat := func(do func() history.Op) {
		running.Go(func() {
			for pace := time.NewTicker(every); ctx.Err() == nil; {
				if op := do(); ctx.Err() == nil {
					p.say(op)
				}
				select {
				case <-ctx.Done():
				case <-pace.C:
				}
			}
		})
	}
	repeat(func() history.Op { return p.connect(ctx, to) })
	repeat(func() history.Op { return p.call(ctx, history.Call, pooled, to) })
	running.Go(func() { p.listen(ctx, to) })
}

func (p *peer) client(to target) *http.Client {
	if p.kept == nil {
		return httpauth.Client(p.id, sdk.ID(to.id))
	}
	config := tlsconfig.MTLSClientConfig(p.kept, p.kept, tlsconfig.AuthorizeID(spiffeid.RequireFromString(to.id)))
	return &http.Client{Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}}
}

// connect makes one call over a connection of its own.
func (p *peer) connect(ctx context.Context, to target) history.Op {
	c := p.client(to)
	defer c.CloseIdleConnections()
	return p.call(ctx, history.Connect, c, to)
}

func (p *peer) call(ctx context.Context, kind history.Kind, c *http.Client, to target) history.Op {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	op := history.Op{Client: p.own, Kind: kind, Key: to.id, Begin: history.Now(), Outcome: history.OK}
	resp, err := post(ctx, c, to.url)
	if op.End = history.Now(); err == nil {
		defer resp.Body.Close()
		if resp.TLS != nil && len(resp.TLS.PeerCertificates) > 0 {
			op.Value = serial(resp.TLS)
		}
		if resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
	}
	if err != nil {
		op.Outcome, op.Detail = history.Failed, err.Error()
		if errors.Is(err, context.DeadlineExceeded) {
			op.Outcome = history.Unknown
		}
	}
	return op
}

func serial(state *tls.ConnectionState) string {
	return state.PeerCertificates[0].SerialNumber.Text(16)
}

// post makes a request that net/http does not send twice.
func post(ctx context.Context, c *http.Client, url string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return nil, err
	}
	return c.Do(req)
}

// listen keeps a stream open, and opens it again when it ends.
func (p *peer) listen(ctx context.Context, to target) {
	c := p.client(to)
	defer c.CloseIdleConnections()
	for ctx.Err() == nil {
		if resp, err := post(ctx, c, to.url+"/feed"); err == nil {
			for lines := bufio.NewScanner(resp.Body); resp.StatusCode == http.StatusOK && lines.Scan(); {
				now := history.Now()
				p.say(history.Op{Client: p.own, Kind: history.Beat, Key: to.id, Begin: now, End: now, Outcome: history.OK})
			}
			resp.Body.Close()
		}
		select {
		case <-ctx.Done():
		case <-time.After(tick):
		}
	}
}

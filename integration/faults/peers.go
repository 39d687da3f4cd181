// The workloads of a world, as processes of their own (command peer).

package faults

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
)

// peer is one workload.
type peer struct {
	id, path string
	address  string
	exe      string
	cmd      *exec.Cmd
	stdin    io.WriteCloser
	log      stage.Buffer
	done     chan error // it has told all
}

// Peers registers and starts the workloads, and waits until each has called each of
// those that it may call.
func (w *World) Peers() {
	w.tb.Helper()
	calls := map[string][]string{web: {orders}, orders: {web}, doomed: {orders}, stranger: {orders}}
	addresses := make(map[string]string)
	if w.setup.Wide {
		calls[web] = append(calls[web], front)
		calls[billing], calls[ledger] = []string{ledger}, []string{billing}
		addresses[front] = w.startFront()
	}
	dir := stage.Dir(w.tb)
	listeners := make(map[string]*net.TCPListener)
	for path := range calls {
		lis, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			w.tb.Fatal(err)
		}
		defer lis.Close() // the peer has its own
		listeners[path], addresses[path] = lis, lis.Addr().String()
	}
	for path, to := range calls {
		var targets []string
		for _, callee := range to {
			targets = append(targets, w.ID(callee)+"="+addresses[callee])
		}
		w.peers = append(w.peers, w.startPeer(dir, path, listeners[path], targets))
	}
	w.tb.Cleanup(w.stopPeers)
	w.await("each peer has called whom it calls", func() error {
		called := make(map[history.Pair]bool)
		for _, op := range w.Rec.History().Ops {
			called[history.Pair{From: op.Client, To: op.Key}] = true
		}
		for path, to := range calls {
			for _, callee := range to {
				if !called[history.Pair{From: w.ID(path), To: w.ID(callee)}] {
					return fmt.Errorf("%s has not called %s; the peers say: %s", path, callee, w.peerLogs())
				}
			}
		}
		return nil
	})
	w.measure()
}

// await is stage.Eventually for a minute: a dozen processes start meanwhile.
func (w *World) await(what string, check func() error) {
	w.tb.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	w.tb.Fatalf("%s: still %v after a minute", what, err)
}

// PeerAddress is where a workload serves.
func (w *World) PeerAddress(path string) string {
	for _, p := range w.peers {
		if p.path == path {
			return p.address
		}
	}
	w.tb.Fatalf("there is no peer %s", path)
	return ""
}

// peerLogs is the end of what each peer wrote to stderr.
func (w *World) peerLogs() (text string) {
	for _, p := range w.peers {
		log := p.log.String()
		text += fmt.Sprintf("\n%s: %s", p.path, log[max(0, len(log)-500):])
	}
	return text
}

// PeersSaid counts how often peers have said so in their logs.
func (w *World) PeersSaid(text string) (n int) {
	for _, p := range w.peers {
		n += strings.Count(p.log.String(), text)
	}
	return n
}

// allowed are the calls that the policy grants.
func (w *World) allowed() []history.Pair {
	return append(w.healthy(), history.Pair{From: w.ID(doomed), To: w.ID(orders)})
}

// healthy are those of them that nobody ever denies.
func (w *World) healthy() []history.Pair {
	pairs := []history.Pair{{From: w.ID(web), To: w.ID(orders)}, {From: w.ID(orders), To: w.ID(web)}}
	if w.setup.Wide {
		pairs = append(pairs, history.Pair{From: w.ID(web), To: w.ID(front)},
			history.Pair{From: w.ID(billing), To: w.ID(ledger)}, history.Pair{From: w.ID(ledger), To: w.ID(billing)})
	}
	return pairs
}

// startFront starts an app, and the sidecar before it, and says where that listens.
func (w *World) startFront() (address string) {
	w.tb.Helper()
	app := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		for every := time.NewTicker(50 * time.Millisecond); r.URL.Path == "/feed"; {
			if _, err := io.WriteString(rw, "beat\n"); err != nil || http.NewResponseController(rw).Flush() != nil {
				return
			}
			select {
			case <-r.Context().Done():
				return
			case <-every.C:
			}
		}
	}))
	w.tb.Cleanup(app.Close)
	w.Register(front, w.AgentID(), "path:"+stage.Bin(w.tb, "merlon-sidecar"))
	address = fmt.Sprintf("127.0.0.1:%d", stage.FreePort(w.tb))
	w.Sidecar = stage.Start(w.tb, "merlon-sidecar", append([]string{"SPIFFE_ENDPOINT_SOCKET=" + w.WorkloadAPI}, w.setup.Env...),
		"-health-address", "off", "-inbound", address+","+app.Listener.Addr().String()+",http")
	return address
}

func (w *World) startPeer(dir, path string, listener *net.TCPListener, calls []string) *peer {
	w.tb.Helper()
	program := w.setup.Peer
	if program == "" {
		program = stage.Build(w.tb, "peer", "integration/faults/peer", "")
	}
	// Each has an executable of its own, which is what its entry asks for.
	p := &peer{id: w.ID(path), path: path, address: listener.Addr().String(), exe: filepath.Join(dir, strings.TrimPrefix(path, "/")), done: make(chan error, 1)}
	text, err := os.ReadFile(stage.Path(w.tb, program))
	if err != nil {
		w.tb.Fatal(err)
	}
	if err := os.WriteFile(p.exe, text, 0o700); err != nil {
		w.tb.Fatal(err)
	}
	agent, socket := w.AgentID(), w.WorkloadAPI
	if path == billing || path == ledger {
		agent, socket = w.ID("/agent/two"), w.Second.WorkloadAPI
	}
	w.Register(path, agent, "path:"+p.exe)
	args := []string{"-id", p.id, "-call", strings.Join(calls, ",")}
	if w.setup.Every > 0 {
		args = append(args, "-every", w.setup.Every.String())
	}
	switch path {
	case stranger:
		args = append(args, "-stranger", "-every", "200ms")
	case doomed:
		args = append(args, "-thief") // denied, it must be kept out by others
	case orders:
		if w.setup.Decide > 0 {
			args = append(args, "-decide", fmt.Sprint(w.setup.Decide), "-may", w.ID(web), "-may-not", w.ID(Former)+","+w.ID(stranger))
		}
	}
	p.cmd = exec.Command(p.exe, args...)
	inherited, err := listener.File()
	if err != nil {
		w.tb.Fatal(err)
	}
	defer inherited.Close()
	p.cmd.ExtraFiles = []*os.File{inherited}
	p.cmd.Env = append(append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+socket), w.setup.Env...)
	p.cmd.Stderr = &p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		w.tb.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		w.tb.Fatal(err)
	}
	go func() { p.done <- w.Rec.Follow(out) }()
	return p
}

// stopPeers ends the workloads and has all that they told: first none calls any
// more, then none is needed.
func (w *World) stopPeers() {
	for _, p := range w.peers {
		if _, err := io.WriteString(p.stdin, "rest\n"); err != nil {
			w.tb.Errorf("%s does not listen: %v", p.path, err)
		}
	}
	for _, p := range w.peers {
		if err := <-p.done; err != nil {
			w.tb.Errorf("what %s told: %v", p.path, err)
		}
	}
	for _, p := range w.peers {
		p.stdin.Close()
		if err := p.cmd.Wait(); err != nil {
			w.tb.Errorf("%s ended by itself: %v\n%s", p.path, err, p.log.String())
		}
	}
	w.peers = nil
}

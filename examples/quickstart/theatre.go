// The stage of the quickstart: built binaries, started processes, and what
// they said when they were ready.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// theatre holds the processes of one run. It is used by one goroutine.
type theatre struct {
	dir     string
	dev     devReady
	started time.Time
	running []*exec.Cmd
	web     string // URL of the web service's plain front
}

// devReady is what `merlon dev -o json` prints once it is ready.
type devReady struct {
	TrustDomain string `json:"trust_domain"`
	WorkloadAPI string `json:"workload_api"`
	Admin       string `json:"admin"`
}

// open builds the three binaries into a temporary folder.
func open(ctx context.Context) (*theatre, error) {
	dir, err := os.MkdirTemp("", "quickstart")
	if err != nil {
		return nil, err
	}
	t := &theatre{dir: dir}
	fmt.Println("building merlon and the two services …")
	for _, pkg := range []string{"./ca/cmd/merlon", "./examples/quickstart/orders", "./examples/quickstart/web"} {
		build := exec.CommandContext(ctx, "go", "build", "-o", t.bin(filepath.Base(pkg)), pkg)
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			t.close()
			return nil, fmt.Errorf("build %s (run this from the top of the repository): %w", pkg, err)
		}
	}
	t.started = time.Now()
	return t, nil
}

func (t *theatre) bin(name string) string { return filepath.Join(t.dir, "bin", name) }

// close ends every process, the last started first, and removes the folder.
func (t *theatre) close() {
	for _, cmd := range slices.Backward(t.running) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
		late := time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // how it ends was seen, or does not matter
		late.Stop()
	}
	_ = os.RemoveAll(t.dir)
}

// start runs a binary that prints one JSON object once it is ready, and
// decodes that object into ready. Its log goes to a file.
func (t *theatre) start(ctx context.Context, ready any, name string, args ...string) error {
	cmd := exec.Command(t.bin(name), args...) // ended by close, in order
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+t.dev.WorkloadAPI)
	log, err := os.Create(t.logPath(name))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	t.running = append(t.running, cmd)
	got := make(chan error, 1)
	go func() { got <- json.NewDecoder(stdout).Decode(ready) }()
	select {
	case err = <-got:
	case <-time.After(20 * time.Second):
		err = errors.New("not ready after 20 s")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		said, _ := os.ReadFile(t.logPath(name))
		return fmt.Errorf("start %s: %w\n%s", name, err, said)
	}
	fmt.Printf("started %s (pid %d)\n", name, cmd.Process.Pid)
	return nil
}

func (t *theatre) logPath(name string) string { return filepath.Join(t.dir, name+".log") }

// merlon runs one command of the CLI, shows it, and returns what it printed.
func (t *theatre) merlon(ctx context.Context, args ...string) (string, error) {
	fmt.Println("$ merlon", strings.ReplaceAll(strings.Join(args, " "), t.dir, "…"))
	cmd := exec.CommandContext(ctx, t.bin("merlon"), args...)
	cmd.Env = append(os.Environ(), "MERLON_ADMIN="+t.dev.Admin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("merlon %s: %w: %s", args[0], err, stderr.String())
	}
	return stdout.String(), nil
}

// outcome is what the web service says of one call that it made.
type outcome struct {
	Status     int    `json:"status"`
	Body       string `json:"body"`
	Server     string `json:"server"` // SPIFFE ID that the server proved
	Serial     string `json:"serial"` // of web's own X509-SVID
	Error      string `json:"error"`
	Reason     string `json:"reason"`
	DecisionID string `json:"decision_id"`
}

// call has the web service call orders.
func (t *theatre) call(ctx context.Context, method, path string) (outcome, error) {
	var out outcome
	resp, err := t.ask(ctx, "/call?method="+method+"&path="+path)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

// ask sends a GET to the web service's plain front.
func (t *theatre) ask(ctx context.Context, pathAndQuery string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.web+pathAndQuery, nil)
	if err != nil {
		return nil, err
	}
	return (&http.Client{}).Do(req)
}

// firstByte waits until a stream has begun.
func firstByte(r io.Reader) error {
	_, err := io.ReadFull(r, make([]byte, 1))
	return err
}

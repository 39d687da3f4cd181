// Processes of the example: built, started, and ended.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// ports are those in web.yaml and orders.yaml; other free ones take their places.
var ports = []string{"8001", "8443", "8080", "8081", "9901", "9902"}

// setup is for one goroutine.
type setup struct {
	dir     string
	envoy   string
	used    map[string]string // port in the files → port
	running []*exec.Cmd
	app     *http.Server
	dev     struct {
		WorkloadAPI string `json:"workload_api"`
		Admin       string `json:"admin"`
	}
}

// open finds Envoy and builds merlon.
func open(ctx context.Context) (*setup, error) {
	envoy, err := findEnvoy()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "envoy")
	if err != nil {
		return nil, err
	}
	s := &setup{dir: dir, envoy: envoy, used: map[string]string{}}
	fmt.Println("building merlon …")
	build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "merlon"), "./ca/cmd/merlon")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		s.close()
		return nil, fmt.Errorf("build merlon (run this from the top of the repository): %w", err)
	}
	for _, port := range ports {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.close()
			return nil, err
		}
		defer lis.Close() // all of them are held until each has its own
		_, s.used[port], _ = net.SplitHostPort(lis.Addr().String())
	}
	return s, nil
}

// findEnvoy is $ENVOY, or what `make interop` has installed, or that of the PATH.
func findEnvoy() (string, error) {
	if path := os.Getenv("ENVOY"); path != "" {
		return path, nil
	}
	dir := os.Getenv("MERLON_INTEROP")
	if cache, err := os.UserCacheDir(); dir == "" && err == nil {
		dir = filepath.Join(cache, "merlon", "interop")
	}
	if found, _ := filepath.Glob(filepath.Join(dir, "venv/lib/python3*/site-packages/envoy/_bin/envoy")); len(found) == 1 {
		return found[0], nil
	}
	if path, err := exec.LookPath("envoy"); err == nil {
		return filepath.EvalSymlinks(path)
	}
	return "", errors.New("no Envoy; hint: make interop, or set ENVOY to its path")
}

func (s *setup) address(port string) string { return "127.0.0.1:" + s.used[port] }

// close ends every process, the last started first.
func (s *setup) close() {
	for _, cmd := range slices.Backward(s.running) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
		late := time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // how it ends was seen, or does not matter
		late.Stop()
	}
	if s.app != nil {
		_ = s.app.Close()
	}
	_ = os.RemoveAll(s.dir)
}

// start starts everything.
func (s *setup) start(ctx context.Context) error {
	dev := exec.Command(filepath.Join(s.dir, "merlon"), "dev", "--dir", filepath.Join(s.dir, "dev"), "--trust-domain", "shop.test",
		"--policy", "examples/envoy/policy", "-o", "json")
	out, err := dev.StdoutPipe()
	if err != nil {
		return err
	}
	if err := s.launch(dev, "merlon"); err != nil {
		return err
	}
	if err := json.NewDecoder(out).Decode(&s.dev); err != nil {
		return fmt.Errorf("start merlon dev: %w", err)
	}
	if err := s.serveOrders(); err != nil {
		return err
	}
	for _, service := range []string{"orders", "web"} {
		// Two Envoys of one user on one machine: the kernel tells them apart by the
		// names of their programs. Elsewhere each runs as its service's user.
		program := filepath.Join(s.dir, "envoy-"+service)
		if err := copyFile(program, s.envoy); err != nil {
			return err
		}
		if _, err := s.merlon(ctx, "entry", "create", "--spiffe-id", "spiffe://shop.test/"+service, "--selector", "unix:path:"+program); err != nil {
			return err
		}
		config, err := s.config(service)
		if err != nil {
			return err
		}
		if err := s.launch(exec.Command(program, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"), "envoy-"+service); err != nil {
			return err
		}
	}
	return nil
}

// launch starts cmd, whose log goes to a file.
func (s *setup) launch(cmd *exec.Cmd, name string) error {
	log, err := os.Create(filepath.Join(s.dir, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return err
	}
	s.running = append(s.running, cmd)
	fmt.Printf("started %s (pid %d)\n", name, cmd.Process.Pid)
	return nil
}

// serveOrders is a service that has never heard of SPIFFE.
func (s *setup) serveOrders() error {
	lis, err := net.Listen("tcp", s.address("8080"))
	if err != nil {
		return err
	}
	s.app = &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "orders: %s %s for %s\n", r.Method, r.RequestURI, r.Header.Get("X-Spiffe-Id"))
	})}
	go func() { _ = s.app.Serve(lis) }() // until close
	return nil
}

// config writes a file of the example with this run's ports and socket.
func (s *setup) config(service string) (string, error) {
	raw, err := os.ReadFile(filepath.Join("examples/envoy", service+".yaml"))
	if err != nil {
		return "", err
	}
	text := strings.ReplaceAll(string(raw), "/run/merlon/agent/public/api.sock", strings.TrimPrefix(s.dev.WorkloadAPI, "unix://"))
	for _, port := range ports {
		text = strings.ReplaceAll(text, "port_value: "+port+"}", "port_value: "+s.used[port]+"}")
	}
	path := filepath.Join(s.dir, service+".yaml")
	return path, os.WriteFile(path, []byte(text), 0o600)
}

// merlon runs one command of the CLI, and returns what it printed.
func (s *setup) merlon(ctx context.Context, args ...string) (string, error) {
	fmt.Println("$ merlon", strings.ReplaceAll(strings.Join(args, " "), s.dir, "…"))
	cmd := exec.CommandContext(ctx, filepath.Join(s.dir, "merlon"), args...)
	cmd.Env = append(os.Environ(), "MERLON_ADMIN="+s.dev.Admin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("merlon %s: %w: %s", args[0], err, stderr.String())
	}
	return stdout.String(), nil
}

// copyFile makes to another name of the file at path, or a copy of it.
func copyFile(to, path string) error {
	if os.Link(path, to) == nil {
		return nil
	}
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, from)
	return errors.Join(err, out.Close())
}

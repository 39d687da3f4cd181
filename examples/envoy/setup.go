// What runs in the example.

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"merlon.dev/examples/internal/procs"
)

// ports are those in web.yaml and orders.yaml; other free ones take their places.
var ports = []string{"8001", "8443", "8080", "8081", "9901", "9902"}

// setup is for one goroutine.
type setup struct {
	*procs.Procs
	envoy string
	used  map[string]string // port in the files → host:port
	app   *http.Server
}

// open finds Envoy and builds merlon.
func open(ctx context.Context) (*setup, error) {
	envoy, err := findEnvoy()
	if err != nil {
		return nil, err
	}
	addresses, err := procs.FreeAddresses(len(ports))
	if err != nil {
		return nil, err
	}
	p, err := procs.Build(ctx, "envoy", "./ca/cmd/merlon")
	if err != nil {
		return nil, err
	}
	s := &setup{Procs: p, envoy: envoy, used: map[string]string{}}
	for i, port := range ports {
		s.used[port] = addresses[i]
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

func (s *setup) address(port string) string { return s.used[port] }

// close ends every process, and orders.
func (s *setup) close() {
	s.Close()
	if s.app != nil {
		_ = s.app.Close()
	}
}

// start starts everything.
func (s *setup) start(ctx context.Context) error {
	if err := s.StartDev(ctx, "--trust-domain", "shop.test", "--policy", "examples/envoy/policy"); err != nil {
		return err
	}
	if err := s.serveOrders(); err != nil {
		return err
	}
	for _, service := range []string{"orders", "web"} {
		program, err := s.Twin(s.envoy, "envoy-"+service)
		if err != nil {
			return err
		}
		if _, err := s.Merlon(ctx, "entry", "create", "--spiffe-id", "spiffe://shop.test/"+service, "--selector", "unix:path:"+program); err != nil {
			return err
		}
		config, err := s.config(service)
		if err != nil {
			return err
		}
		if err := s.Start("envoy-"+service, exec.Command(program, "-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warning")); err != nil {
			return err
		}
	}
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
	text := strings.ReplaceAll(string(raw), "/run/merlon/agent/public/api.sock", strings.TrimPrefix(s.Dev.WorkloadAPI, "unix://"))
	for _, port := range ports {
		text = strings.ReplaceAll(text, "port_value: "+port+"}", "port_value: "+s.used[port][strings.LastIndex(s.used[port], ":")+1:]+"}")
	}
	path := filepath.Join(s.Dir, service+".yaml")
	return path, os.WriteFile(path, []byte(text), 0o600)
}

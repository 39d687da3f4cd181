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
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// setup is for one goroutine.
type setup struct {
	dir     string
	running []*exec.Cmd
	orders  string // where callers reach the sidecar of orders
	web     string // where web reaches its own
	dev     struct {
		WorkloadAPI string `json:"workload_api"`
		Admin       string `json:"admin"`
	}
}

// open looks for what Debian has, and builds what is ours.
func open(ctx context.Context) (*setup, error) {
	for _, program := range []string{"nginx", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("no %s; hint: apt-get install nginx-light curl", program)
		}
	}
	dir, err := os.MkdirTemp("", "sidecar")
	if err != nil {
		return nil, err
	}
	s := &setup{dir: dir}
	fmt.Println("building merlon and merlon-sidecar …")
	build := exec.CommandContext(ctx, "go", "build", "-o", dir+"/", "./ca/cmd/merlon", "./sdk/cmd/merlon-sidecar")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		s.close()
		return nil, fmt.Errorf("build (run this from the top of the repository): %w", err)
	}
	for _, address := range []*string{&s.orders, &s.web} {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			s.close()
			return nil, err
		}
		defer lis.Close() // both are held until each has its own
		*address = lis.Addr().String()
	}
	return s, nil
}

// close ends every process, the last started first.
func (s *setup) close() {
	for _, cmd := range slices.Backward(s.running) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
		late := time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // how it ends was seen, or does not matter
		late.Stop()
	}
	_ = os.RemoveAll(s.dir)
}

// start starts everything.
func (s *setup) start(ctx context.Context) error {
	dev := exec.Command(filepath.Join(s.dir, "merlon"), "dev", "--dir", filepath.Join(s.dir, "dev"), "--trust-domain", "shop.test",
		"--policy", "examples/sidecar/policy", "-o", "json")
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
	config, err := s.nginxConfig()
	if err != nil {
		return err
	}
	app := "unix://" + filepath.Join(s.dir, "nginx.sock")
	if err := s.sidecar(ctx, "orders", "exec", "-inbound", s.orders+","+app+",http", "--", "nginx", "-c", config, "-e", filepath.Join(s.dir, "nginx.err")); err != nil {
		return err
	}
	return s.sidecar(ctx, "web", "-outbound", s.web+",orders,http,"+s.orders)
}

// sidecar registers the sidecar of a service and starts it.
func (s *setup) sidecar(ctx context.Context, service string, args ...string) error {
	// Two sidecars of one user on one machine: the kernel tells them apart by the
	// names of their programs. Elsewhere each runs as its service's user.
	program := filepath.Join(s.dir, "sidecar-"+service)
	if err := os.Link(filepath.Join(s.dir, "merlon-sidecar"), program); err != nil {
		return err
	}
	if _, err := s.merlon(ctx, "entry", "create", "--spiffe-id", "spiffe://shop.test/"+service, "--selector", "unix:path:"+program); err != nil {
		return err
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+s.dev.WorkloadAPI, "MERLON_SIDECAR_HEALTH_ADDRESS=off")
	fmt.Println("$ merlon-sidecar", strings.ReplaceAll(strings.Join(args, " "), s.dir, "…"))
	return s.launch(cmd, "sidecar-"+service)
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
	return nil
}

// nginxConfig writes nginx.conf with this run's folder.
func (s *setup) nginxConfig() (string, error) {
	raw, err := os.ReadFile("examples/sidecar/nginx.conf")
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.dir, "nginx.conf")
	return path, os.WriteFile(path, bytes.ReplaceAll(raw, []byte("DIR"), []byte(s.dir)), 0o600)
}

// merlon runs one command of the CLI, and returns what it printed.
func (s *setup) merlon(ctx context.Context, args ...string) (string, error) {
	fmt.Println("$ merlon", strings.ReplaceAll(strings.Join(args, " "), s.dir, "…"))
	cmd := exec.CommandContext(ctx, filepath.Join(s.dir, "merlon"), args...)
	cmd.Env = append(os.Environ(), "MERLON_ADMIN="+s.dev.Admin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", errors.Join(fmt.Errorf("merlon %s: %w: %s", args[0], err, stderr.String()), s.logs())
	}
	return stdout.String(), nil
}

// logs is what the processes have logged, for who looks for what went wrong.
func (s *setup) logs() error {
	names, _ := filepath.Glob(filepath.Join(s.dir, "*.log"))
	var all []error
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		text, _ := io.ReadAll(io.LimitReader(f, 4<<10))
		_ = f.Close() // it was only read
		all = append(all, fmt.Errorf("%s: %s", filepath.Base(name), text))
	}
	return errors.Join(all...)
}

// What runs in the example.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"merlon.dev/examples/internal/procs"
)

// setup is for one goroutine.
type setup struct {
	*procs.Procs
	orders string // where callers reach the sidecar of orders
	web    string // where web reaches its own
}

// open looks for what Debian has, and builds what is ours.
func open(ctx context.Context) (*setup, error) {
	for _, program := range []string{"nginx", "curl"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("no %s; hint: apt-get install nginx-light curl", program)
		}
	}
	addresses, err := procs.FreeAddresses(2)
	if err != nil {
		return nil, err
	}
	p, err := procs.Build(ctx, "sidecar", "./ca/cmd/merlon", "./sdk/cmd/merlon-sidecar")
	if err != nil {
		return nil, err
	}
	return &setup{Procs: p, orders: addresses[0], web: addresses[1]}, nil
}

// start starts everything.
func (s *setup) start(ctx context.Context) error {
	if err := s.StartDev(ctx, "--trust-domain", "shop.test", "--policy", "examples/sidecar/policy"); err != nil {
		return err
	}
	config, err := s.nginxConfig()
	if err != nil {
		return err
	}
	app := "unix://" + filepath.Join(s.Dir, "nginx.sock")
	if err := s.sidecar(ctx, "orders", "exec", "-inbound", s.orders+","+app+",http", "--", "nginx", "-c", config, "-e", filepath.Join(s.Dir, "nginx.err")); err != nil {
		return err
	}
	if err := s.sidecar(ctx, "web", "-outbound", s.web+",orders,http,"+s.orders); err != nil {
		return err
	}
	if err := procs.Await(ctx, app, s.orders, s.web); err != nil {
		return errors.Join(err, s.Logs())
	}
	return nil
}

// sidecar registers the sidecar of a service and starts it.
func (s *setup) sidecar(ctx context.Context, service string, args ...string) error {
	program, err := s.Twin(s.Bin("merlon-sidecar"), "sidecar-"+service)
	if err != nil {
		return err
	}
	if _, err := s.Merlon(ctx, "entry", "create", "--spiffe-id", "spiffe://shop.test/"+service, "--selector", "unix:path:"+program); err != nil {
		return err
	}
	fmt.Println("$ merlon-sidecar", s.Short(args...))
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "MERLON_SIDECAR_HEALTH_ADDRESS=off")
	return s.Start("sidecar-"+service, cmd)
}

// nginxConfig writes nginx.conf with this run's folder.
func (s *setup) nginxConfig() (string, error) {
	raw, err := os.ReadFile("examples/sidecar/nginx.conf")
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.Dir, "nginx.conf")
	return path, os.WriteFile(path, bytes.ReplaceAll(raw, []byte("DIR"), []byte(s.Dir)), 0o600)
}

// Package procs starts and ends the processes of an example: what it builds, `merlon
// dev`, and whatever else runs beside. Everything is in one temporary folder, and gone
// after Close.
package procs

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

// Procs are the processes of one run. It is for one goroutine.
type Procs struct {
	// Dir is the folder of the run.
	Dir string
	// Dev is what `merlon dev` has said of itself.
	Dev struct {
		TrustDomain string `json:"trust_domain"`
		WorkloadAPI string `json:"workload_api"`
		Admin       string `json:"admin"`
	}

	running []*exec.Cmd
}

// Build makes the folder, and compiles packages of the repository into it.
func Build(ctx context.Context, example string, packages ...string) (*Procs, error) {
	dir, err := os.MkdirTemp("", example)
	if err != nil {
		return nil, err
	}
	p := &Procs{Dir: dir}
	var names []string
	for _, pkg := range packages {
		names = append(names, filepath.Base(pkg))
	}
	fmt.Printf("building %s …\n", strings.Join(names, ", "))
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-o", p.Bin("")}, packages...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		p.Close()
		return nil, fmt.Errorf("build %s: %w; hint: run this from the top of the repository", strings.Join(names, ", "), err)
	}
	return p, nil
}

// Bin is the path of a binary that was built.
func (p *Procs) Bin(name string) string { return filepath.Join(p.Dir, "bin") + "/" + name }

// Close ends every process, the last started first, and removes the folder.
func (p *Procs) Close() {
	for _, cmd := range slices.Backward(p.running) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
		late := time.AfterFunc(15*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // how it ends was seen, or does not matter
		late.Stop()
	}
	_ = os.RemoveAll(p.Dir)
}

// StartDev starts `merlon dev` with further arguments.
func (p *Procs) StartDev(ctx context.Context, args ...string) error {
	args = append([]string{"dev", "--dir", filepath.Join(p.Dir, "dev"), "-o", "json"}, args...)
	return p.StartReady(ctx, &p.Dev, "merlon", exec.Command(p.Bin("merlon"), args...))
}

// Start starts cmd, which finds the Workload API of `merlon dev`. Its log goes to a
// file.
func (p *Procs) Start(name string, cmd *exec.Cmd) error {
	log, err := os.Create(filepath.Join(p.Dir, name+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	cmd.Env = append(cmd.Environ(), "SPIFFE_ENDPOINT_SOCKET="+p.Dev.WorkloadAPI)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	p.running = append(p.running, cmd)
	fmt.Printf("started %s (pid %d)\n", name, cmd.Process.Pid)
	return nil
}

// StartReady is Start for a program that prints one JSON object once it is ready, which
// is decoded into ready.
func (p *Procs) StartReady(ctx context.Context, ready any, name string, cmd *exec.Cmd) error {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.Start(name, cmd); err != nil {
		return err
	}
	got := make(chan error, 1)
	go func() { got <- json.NewDecoder(out).Decode(ready) }()
	select {
	case err = <-got:
	case <-time.After(20 * time.Second):
		err = errors.New("not ready after 20 s")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", name, err), p.Logs())
	}
	return nil
}

// Merlon runs one command of the CLI, shows it, and returns what it printed.
func (p *Procs) Merlon(ctx context.Context, args ...string) (string, error) {
	fmt.Println("$ merlon", p.Short(args...))
	cmd := exec.CommandContext(ctx, p.Bin("merlon"), args...)
	cmd.Env = append(os.Environ(), "MERLON_ADMIN="+p.Dev.Admin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", errors.Join(fmt.Errorf("merlon %s: %w: %s", args[0], err, stderr.String()), p.Logs())
	}
	return stdout.String(), nil
}

// Short is a command line as it is shown, without the folder of the run.
func (p *Procs) Short(args ...string) string {
	return strings.ReplaceAll(strings.Join(args, " "), p.Dir, "…")
}

// Logs is what the processes have logged, for who looks for what went wrong.
func (p *Procs) Logs() error {
	names, _ := filepath.Glob(filepath.Join(p.Dir, "*.log"))
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

// Twin gives a program another name, and returns its path: the kernel tells two
// processes of one user apart by their programs. Elsewhere each runs as its service's
// user.
func (p *Procs) Twin(program, name string) (path string, err error) {
	path = p.Bin(name)
	if os.Link(program, path) == nil {
		return path, nil
	}
	from, err := os.Open(program) // on another disk
	if err != nil {
		return "", err
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o700)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(to, from)
	return path, errors.Join(err, to.Close())
}

// FreeAddresses are n of loopback where nobody listens.
func FreeAddresses(n int) (all []string, err error) {
	for range n {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer lis.Close() // all of them are held until each is another
		all = append(all, lis.Addr().String())
	}
	return all, nil
}

// Await waits until somebody listens at each address, host:port or unix:///PATH.
func Await(ctx context.Context, addresses ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, address := range addresses {
		network := "tcp"
		path, isUnix := strings.CutPrefix(address, "unix://")
		if isUnix {
			network = "unix"
		}
		for {
			conn, err := new(net.Dialer).DialContext(ctx, network, path)
			if err == nil {
				_ = conn.Close() // nothing was said on it
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("nobody listens at %s: %w", address, err)
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

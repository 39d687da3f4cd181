// A PostgreSQL server of the distribution, in a folder of its own on loopback, whose
// users log in with certificates.

package stage

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Postgres is that server.
type Postgres struct {
	Dir  string
	Port int
	As   *syscall.SysProcAttr // as whom it runs: it refuses to as root; nil: as oneself
	tb   testing.TB
	bin  string
	log  Buffer
}

// NewPostgres looks for the server, without which the test is skipped, and makes a
// folder for it.
func NewPostgres(tb testing.TB) *Postgres {
	tb.Helper()
	// Debian keeps them out of the path.
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/psql")
	if path, lookErr := exec.LookPath("psql"); lookErr == nil && len(found) == 0 {
		found = append(found, path)
	}
	if err != nil || len(found) == 0 {
		tb.Skip("PostgreSQL is not installed: apt-get install postgresql")
	}
	p := &Postgres{tb: tb, bin: filepath.Dir(found[len(found)-1]), Dir: Dir(tb), Port: FreePort(tb)}
	if _, err := os.Stat(filepath.Join(p.bin, "initdb")); err != nil {
		tb.Skip("PostgreSQL's server is not installed: apt-get install postgresql")
	}
	if os.Geteuid() != 0 {
		return p
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		tb.Skipf("there is no user to run PostgreSQL as: %v: apt-get install postgresql", err)
	}
	uid, gid := number(tb, u.Uid), number(tb, u.Gid)
	p.As = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	if err := os.Chown(p.Dir, int(uid), int(gid)); err != nil {
		tb.Fatal(err)
	}
	return p
}

func number(tb testing.TB, text string) uint32 {
	tb.Helper()
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		tb.Fatal(err)
	}
	return uint32(n)
}

// Command is one of PostgreSQL's, as its user.
func (p *Postgres) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.Path(name), args...)
	cmd.Dir, cmd.SysProcAttr = p.Dir, p.As
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "HOME=" + p.Dir}
	return cmd
}

// Path is that of one of PostgreSQL's programs.
func (p *Postgres) Path(name string) string { return filepath.Join(p.bin, name) }

// Data is the server's data directory.
func (p *Postgres) Data() string { return filepath.Join(p.Dir, "data") }

// Write makes a file of the server's.
func (p *Postgres) Write(name string, text []byte) string {
	p.tb.Helper()
	path := filepath.Join(p.Dir, name)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		p.tb.Fatal(err)
	}
	if p.As != nil {
		if err := os.Chown(path, int(p.As.Credential.Uid), int(p.As.Credential.Gid)); err != nil {
			p.tb.Fatal(err)
		}
	}
	return path
}

// Start runs the server until the test ends. It shows the chain of a PEM file, takes
// the roots of another for who may log in, and has one user.
func (p *Postgres) Start(chain, key, roots, role string) {
	p.tb.Helper()
	if out, err := p.Command(p.tb.Context(), "initdb", "-D", p.Data(), "-U", "postgres", "--auth=reject", "--no-sync", "--no-instructions").CombinedOutput(); err != nil {
		p.tb.Fatalf("initdb: %v\n%s", err, out)
	}
	hba := p.Write("hba.conf", []byte("local all postgres trust\nhostssl all all 127.0.0.1/32 cert\n"))
	server := p.Command(context.Background(), "postgres", "-D", p.Data(), "-k", p.Dir, "-h", "127.0.0.1", "-p", strconv.Itoa(p.Port),
		"-c", "hba_file="+hba, "-c", "ssl=on", "-c", "ssl_min_protocol_version=TLSv1.3", "-c", "fsync=off",
		"-c", "ssl_cert_file="+chain, "-c", "ssl_key_file="+key, "-c", "ssl_ca_file="+roots)
	server.Stdout, server.Stderr = &p.log, &p.log
	if err := server.Start(); err != nil {
		p.tb.Fatal(err)
	}
	p.tb.Cleanup(func() {
		server.Process.Signal(syscall.SIGINT) // at once, in order
		late := time.AfterFunc(20*time.Second, func() { server.Process.Kill() })
		defer late.Stop()
		if err := server.Wait(); err != nil {
			p.tb.Errorf("PostgreSQL: %v", err)
		}
		if p.tb.Failed() {
			p.tb.Logf("log of PostgreSQL:\n%s", p.log.String())
		}
	})
	Eventually(p.tb, "PostgreSQL answers", func() error {
		out, err := p.Command(p.tb.Context(), "psql", "-h", p.Dir, "-p", strconv.Itoa(p.Port), "-U", "postgres", "-c", "CREATE ROLE "+role+" LOGIN").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

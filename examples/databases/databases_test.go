// The examples against the servers of the distribution: X509-SVIDs that live for
// seconds rotate on both sides, and no query fails; who is not who they should be is
// refused on either side.
package databases_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

// ttl is how long X509-SVIDs live here; they are renewed after about half of it.
const ttl = 8 * time.Second

// rotations is how many times each client has to change its X509-SVID.
const rotations = 2

func TestMain(m *testing.M) {
	m.Run()
	stage.RemoveBins()
}

// program builds an example, gives it a name of its own, by which its entry knows it,
// and returns its path.
func program(t *testing.T, d *stage.Domain, name, example string, entry ...string) string {
	t.Helper()
	built := stage.Bin(t, stage.Build(t, "example-"+example, "examples/databases/"+example, ""))
	bin := filepath.Join(filepath.Dir(built), name)
	if err := os.Link(built, bin); err != nil {
		t.Fatal(err)
	}
	d.Merlon(append([]string{"entry", "create", "--spiffe-id", d.ID("/" + name), "--selector", "unix:path:" + bin, "--ttl", ttl.String()}, entry...)...)
	return bin
}

// domain starts a trust domain whose agent any user of this machine can reach.
func domain(t *testing.T) *stage.Domain {
	t.Helper()
	d := stage.Dev(t)
	reachable(t, strings.TrimPrefix(d.WorkloadAPI, "unix://"))
	reachable(t, stage.Bin(t, "merlon"))
	return d
}

// reachable lets every user into the temporary folders above path.
func reachable(t *testing.T, path string) {
	t.Helper()
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err == nil {
			err = os.Chmod(dir, info.Mode().Perm()|0o711)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// running is a program that was started.
type running struct {
	out  stage.Buffer
	done chan struct{} // closed when it has ended
}

// start runs cmd with the agent's socket until the test ends.
func start(t *testing.T, d *stage.Domain, cmd *exec.Cmd) *running {
	t.Helper()
	r := &running{done: make(chan struct{})}
	cmd.Env = append(cmd.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
	cmd.Stdout, cmd.Stderr = &r.out, &r.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var err error
	go func() { err = cmd.Wait(); close(r.done) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		late := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer late.Stop()
		if <-r.done; err != nil {
			t.Errorf("%s: %v", cmd.Path, err)
		}
		if t.Failed() {
			t.Logf("%s printed:\n%s", cmd.Path, r.out.String())
		}
	})
	return r
}

// keepFiles has svidfiles keep the server's X509-SVID in files of dir.
func keepFiles(t *testing.T, d *stage.Domain, cmd *exec.Cmd, dir string) {
	t.Helper()
	start(t, d, cmd)
	stage.Eventually(t, "the X509-SVID is in files", func() error {
		for _, name := range []string{"svid.pem", "key.pem", "bundle.pem"} {
			if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		return nil
	})
}

// rotates waits until the client has used several X509-SVIDs. A query that fails ends
// the client, and with it the test.
func rotates(t *testing.T, client *running) {
	t.Helper()
	late := time.After(2 * time.Minute)
	for serials := map[string]bool{}; len(serials) <= rotations; {
		select {
		case <-client.done:
			t.Fatal("the client has ended")
		case <-late:
			t.Fatalf("%d X509-SVIDs were used", len(serials))
		case <-time.After(20 * time.Millisecond):
		}
		for line := range strings.Lines(client.out.String()) {
			if f := strings.Fields(line); len(f) == 2 {
				serials[f[1]] = true
			}
		}
	}
}

// refused runs a client to its end, which has to be a refusal that says so.
func refused(t *testing.T, d *stage.Domain, want string, bin string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), want) {
		t.Errorf("%s %q: %v; want a refusal with %q\n%s", filepath.Base(bin), args, err, want, out)
	}
}

// outsiders are TLS configurations of clients that are not of the trust domain.
func outsiders(t *testing.T, d *stage.Domain) map[string]*tls.Config {
	t.Helper()
	leaf := forge.New(t, d.TrustDomain).Intermediate().Leaf("/app", func(c *x509.Certificate) { c.Subject.CommonName = "app" }).X509SVID()
	forged := tls.Certificate{PrivateKey: leaf.PrivateKey}
	for _, c := range leaf.Certificates {
		forged.Certificate = append(forged.Certificate, c.Raw)
	}
	return map[string]*tls.Config{
		"without a certificate": {InsecureSkipVerify: true},
		"of another root":       {InsecureSkipVerify: true, Certificates: []tls.Certificate{forged}},
	}
}

func TestPostgres(t *testing.T) {
	t.Parallel()
	p := stage.NewPostgres(t)
	d := domain(t)
	files := exec.Command(program(t, d, "postgres", "svidfiles", "--dns", "localhost"), "-dir", p.Dir, "--", p.Path("pg_ctl"), "reload", "-D", p.Data())
	files.SysProcAttr = p.As
	keepFiles(t, d, files, p.Dir)
	at := func(name string) string { return filepath.Join(p.Dir, name) }
	p.Start(at("svid.pem"), at("key.pem"), at("bundle.pem"), "app")
	url := fmt.Sprintf("postgres://app@127.0.0.1:%d/postgres?sslmode=require", p.Port)

	app := program(t, d, "app", "postgres", "--cn", "app")
	client := start(t, d, exec.Command(app, "-url", url))
	other := program(t, d, "mallory", "postgres", "--cn", "mallory")
	refused(t, d, `certificate authentication failed for user "app"`, other, "-url", url)
	refused(t, d, d.ID("/orders")+" is expected", app, "-url", url, "-server", "orders")
	for name, cfg := range outsiders(t, d) {
		config, err := pgx.ParseConfig(url)
		if err != nil {
			t.Fatal(err)
		}
		config.TLSConfig = cfg
		if conn, err := pgx.ConnectConfig(t.Context(), config); err == nil {
			conn.Close(t.Context())
			t.Errorf("a client %s was let in", name)
		}
	}
	rotates(t, client)
}

func TestRedis(t *testing.T) {
	t.Parallel()
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("Redis is not installed: apt-get install redis-server")
	}
	d := domain(t)
	dir := stage.Dir(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	set := []string{"-s", at("redis.sock"), "config", "set", "tls-cert-file", at("svid.pem"), "tls-key-file", at("key.pem"), "tls-ca-cert-file", at("bundle.pem")}
	keepFiles(t, d, exec.Command(program(t, d, "redis", "svidfiles"), append([]string{"-dir", dir, "--", "redis-cli"}, set...)...), dir)
	address := fmt.Sprintf("127.0.0.1:%d", stage.FreePort(t))
	server := start(t, d, exec.Command(bin, "--port", "0", "--bind", "127.0.0.1", "--tls-port", address[len("127.0.0.1:"):], "--unixsocket", at("redis.sock"),
		"--tls-cert-file", at("svid.pem"), "--tls-key-file", at("key.pem"), "--tls-ca-cert-file", at("bundle.pem"),
		"--tls-auth-clients", "yes", "--tls-protocols", "TLSv1.3", "--save", "", "--dir", dir))
	stage.Eventually(t, "Redis answers", func() error {
		if !strings.Contains(server.out.String(), "Ready to accept connections") {
			return errors.New(server.out.String())
		}
		return nil
	})

	counter := program(t, d, "counter", "redis")
	client := start(t, d, exec.Command(counter, "-address", address))
	refused(t, d, d.ID("/orders")+" is expected", counter, "-address", address, "-server", "orders")
	for name, cfg := range outsiders(t, d) {
		c := redis.NewClient(&redis.Options{Addr: address, TLSConfig: cfg, MaxRetries: -1})
		if err := c.Ping(t.Context()).Err(); err == nil {
			t.Errorf("a client %s was let in", name)
		}
		c.Close()
	}
	rotates(t, client)
}

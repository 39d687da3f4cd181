// An X509-SVID as software sees it that reads common names and knows nothing of
// SPIFFE: PostgreSQL's `cert` login, with psql and the server of the distribution.

package integration_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

// postgres is a server in a folder of its own, on loopback.
type postgres struct {
	t    *testing.T
	bin  string
	dir  string
	port int
	as   *syscall.SysProcAttr // it refuses to run as root
	log  stage.Buffer
}

// newPostgres looks for the server and makes a folder for it.
func newPostgres(t *testing.T) *postgres {
	t.Helper()
	// Debian keeps them out of the path.
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/psql")
	if path, lookErr := exec.LookPath("psql"); lookErr == nil && len(found) == 0 {
		found = append(found, path)
	}
	if err != nil || len(found) == 0 {
		t.Skip("PostgreSQL is not installed: apt-get install postgresql")
	}
	p := &postgres{t: t, bin: filepath.Dir(found[len(found)-1]), dir: stage.Dir(t), port: stage.FreePort(t)}
	if _, err := os.Stat(filepath.Join(p.bin, "initdb")); err != nil {
		t.Skip("PostgreSQL's server is not installed: apt-get install postgresql")
	}
	if os.Geteuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Skipf("there is no user to run PostgreSQL as: %v: apt-get install postgresql", err)
		}
		uid, gid := number(t, u.Uid), number(t, u.Gid)
		p.as = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
		if err := os.Chown(p.dir, int(uid), int(gid)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func number(t *testing.T, text string) uint32 {
	t.Helper()
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}

// command is one of PostgreSQL's, as its user.
func (p *postgres) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, name), args...)
	cmd.Dir, cmd.SysProcAttr = p.dir, p.as
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "HOME=" + p.dir}
	return cmd
}

// write makes a file of the server's.
func (p *postgres) write(name string, text []byte) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		p.t.Fatal(err)
	}
	if p.as != nil {
		if err := os.Chown(path, int(p.as.Credential.Uid), int(p.as.Credential.Gid)); err != nil {
			p.t.Fatal(err)
		}
	}
	return path
}

// start has the server show its SVID, and take the roots for who may log in.
func (p *postgres) start(own *x509svid.SVID, roots []byte) {
	p.t.Helper()
	data := filepath.Join(p.dir, "data")
	if out, err := p.command(p.t.Context(), "initdb", "-D", data, "-U", "postgres", "--auth=reject", "--no-sync", "--no-instructions").CombinedOutput(); err != nil {
		p.t.Fatalf("initdb: %v\n%s", err, out)
	}
	chain, key := pemFiles(p.t, own)
	hba := p.write("hba.conf", []byte("local all postgres trust\nhostssl all all 127.0.0.1/32 cert\n"))
	server := p.command(context.Background(), "postgres", "-D", data, "-k", p.dir, "-h", "127.0.0.1", "-p", strconv.Itoa(p.port),
		"-c", "hba_file="+hba, "-c", "ssl=on", "-c", "ssl_min_protocol_version=TLSv1.3", "-c", "fsync=off",
		"-c", "ssl_cert_file="+p.write("server.crt", chain), "-c", "ssl_key_file="+p.write("server.key", key),
		"-c", "ssl_ca_file="+p.write("root.crt", roots))
	server.Stdout, server.Stderr = &p.log, &p.log
	if err := server.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		server.Process.Signal(syscall.SIGINT) // at once, in order
		late := time.AfterFunc(20*time.Second, func() { server.Process.Kill() })
		defer late.Stop()
		if err := server.Wait(); err != nil {
			p.t.Errorf("PostgreSQL: %v", err)
		}
		if p.t.Failed() {
			p.t.Logf("log of PostgreSQL:\n%s", p.log.String())
		}
	})
	stage.Eventually(p.t, "PostgreSQL answers", func() error {
		out, err := p.command(p.t.Context(), "psql", "-h", p.dir, "-p", strconv.Itoa(p.port), "-U", "postgres", "-c", "CREATE ROLE alice LOGIN").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// login is psql as alice over TLS, as any client: it checks the server's chain
// and name, and shows an SVID or none.
func (p *postgres) login(own *x509svid.SVID) (string, error) {
	p.t.Helper()
	dsn := fmt.Sprintf("host=localhost hostaddr=127.0.0.1 port=%d user=alice dbname=postgres sslmode=verify-full sslrootcert=%s", p.port, filepath.Join(p.dir, "root.crt"))
	if own != nil {
		chain, key := pemFiles(p.t, own)
		dsn += " sslcert=" + p.write("client.crt", chain) + " sslkey=" + p.write("client.key", key)
	} else {
		dsn += " sslcert=none" // no such file
	}
	out, err := p.command(p.t.Context(), "psql", "-At", dsn, "-c", "SELECT current_user, client_dn, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()").CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func pemFiles(t *testing.T, s *x509svid.SVID) (chain, key []byte) {
	t.Helper()
	chain, key, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return chain, key
}

// TestPostgresLoginWithAnSVID: the entry's --cn is the database's user, and
// --dns the name of the server; both chains end in the trust bundle.
func TestPostgresLoginWithAnSVID(t *testing.T) {
	p := newPostgres(t)
	d := stage.Separate(t)
	d.Entry("/postgres", "--dns", "localhost")
	d.Entry("/alice", "--cn", "alice")
	d.Entry("/mallory", "--cn", "mallory")
	d.Entry("/nameless")
	svids, roots := fetchAll(t, d, 4)
	p.start(svids["/postgres"], roots)

	if out, err := p.login(svids["/alice"]); err != nil || out != "alice|/CN=alice|TLSv1.3" {
		t.Errorf("login of alice: %v\n%s", err, out)
	}
	stranger := forge.New(t, d.TrustDomain).Intermediate().Leaf("/alice", func(c *x509.Certificate) { c.Subject.CommonName = "alice" })
	for name, test := range map[string]struct {
		svid *x509svid.SVID
		want string
	}{
		"another's common name": {svids["/mallory"], `certificate authentication failed for user "alice"`},
		"no common name":        {svids["/nameless"], `certificate authentication failed for user "alice"`},
		"no certificate":        {nil, "connection requires a valid client certificate"},
		"another root":          {stranger.X509SVID(), "unknown ca"},
	} {
		if out, err := p.login(test.svid); err == nil || !strings.Contains(out, test.want) {
			t.Errorf("login as alice with %s: %v\n%s\nwant a refusal with %q", name, err, out, test.want)
		}
	}
}

// fetchAll gets n SVIDs of this process, by path, and the roots in PEM.
func fetchAll(t *testing.T, d *stage.Domain, n int) (svids map[string]*x509svid.SVID, roots []byte) {
	t.Helper()
	stage.Eventually(t, "the SVIDs are there", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(d.WorkloadAPI))
		if err != nil {
			return err
		}
		svids, roots = make(map[string]*x509svid.SVID), nil
		for _, s := range got.SVIDs {
			svids[s.ID.Path()] = s
		}
		for _, bundle := range got.Bundles.Bundles() {
			for _, root := range bundle.X509Authorities() {
				roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw})...)
			}
		}
		if len(svids) != n {
			return fmt.Errorf("%d SVIDs of %d", len(svids), n)
		}
		return nil
	})
	return svids, roots
}

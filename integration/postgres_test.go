// An X509-SVID as software sees it that reads common names and knows nothing of
// SPIFFE: PostgreSQL's `cert` login, with psql and the server of the distribution.

package integration_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
	"merlon.dev/sdk/svid/forge"
)

// login is psql as alice over TLS, as any client: it checks the server's chain
// and name, and shows an SVID or none.
func login(t *testing.T, p *stage.Postgres, own *x509svid.SVID) (string, error) {
	t.Helper()
	dsn := fmt.Sprintf("host=localhost hostaddr=127.0.0.1 port=%d user=alice dbname=postgres sslmode=verify-full sslrootcert=%s", p.Port, filepath.Join(p.Dir, "root.crt"))
	if own != nil {
		chain, key := pemFiles(t, own)
		dsn += " sslcert=" + p.Write("client.crt", chain) + " sslkey=" + p.Write("client.key", key)
	} else {
		dsn += " sslcert=none" // no such file
	}
	out, err := p.Command(t.Context(), "psql", "-At", dsn, "-c", "SELECT current_user, client_dn, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()").CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// TestPostgresLoginWithAnSVID: the entry's --cn is the database's user, and
// --dns the name of the server; both chains end in the trust bundle.
func TestPostgresLoginWithAnSVID(t *testing.T) {
	p := stage.NewPostgres(t)
	d := stage.Separate(t)
	d.Entry("/postgres", "--dns", "localhost")
	d.Entry("/alice", "--cn", "alice")
	d.Entry("/mallory", "--cn", "mallory")
	d.Entry("/nameless")
	svids, roots := fetchAll(t, d, 4)
	chain, key := pemFiles(t, svids["/postgres"])
	p.Start(p.Write("server.crt", chain), p.Write("server.key", key), p.Write("root.crt", roots), "alice")

	if out, err := login(t, p, svids["/alice"]); err != nil || out != "alice|/CN=alice|TLSv1.3" {
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
		if out, err := login(t, p, test.svid); err == nil || !strings.Contains(out, test.want) {
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

func pemFiles(t *testing.T, s *x509svid.SVID) (chain, key []byte) {
	t.Helper()
	chain, key, err := s.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return chain, key
}

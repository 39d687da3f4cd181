// T38: a client that asks for new keys again and again and says nothing else. Each costs
// it one record, and the server a key schedule and an answer (CVE-2026-56862 and before).

package attacks_test

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/pem"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
)

// mostKeyUpdates is how many the client can have sent at the latest when it hears that
// the connection has ended. Go's limit is 16 in a row; a server that reads on for a while,
// so that its last words arrive, is heard later.
const mostKeyUpdates = 1000

// keyUpdates floods every listener that has TLS, as somebody who is let in.
func (c *town) keyUpdates(t *testing.T, listeners map[string]listener) {
	t.Helper()
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Log("key updates are not tried without openssl: apt-get install openssl")
		return
	}
	own := c.ownFile(t)
	for name, l := range listeners {
		if l.network != "tcp" || strings.Contains(name, "health") {
			continue
		}
		protocol := "http/1.1"
		if name == "the CA's gRPC" {
			protocol = "h2"
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		n, text := updateKeys(ctx, t, "-connect", l.address, "-alpn", protocol, "-cert", own, "-key", own, "-cert_chain", own)
		if n < 2 || n > mostKeyUpdates {
			t.Errorf("%s: %d key updates; want an end after some, and %d at most:\n%s", name, n, mostKeyUpdates, text)
		}
		if err := l.honest(ctx); err != nil {
			t.Errorf("%s afterwards: %v", name, err)
		}
	}
}

// updateKeys says for how many key updates a server stays connected, and what the client
// printed.
func updateKeys(ctx context.Context, t *testing.T, args ...string) (n int, text string) {
	t.Helper()
	cmd := exec.CommandContext(ctx, "openssl", append([]string{"s_client", "-tls1_3", "-no_ign_eof"}, args...)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, both := io.Pipe()
	cmd.Stdout, cmd.Stderr = both, both
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { both.CloseWithError(cmd.Wait()) }()
	defer cmd.Cancel()
	var all strings.Builder
	for lines := bufio.NewScanner(out); n <= mostKeyUpdates && lines.Scan(); {
		all.WriteString(lines.Text() + "\n")
		// It takes one letter at a time, once it is connected, and says so.
		switch line := lines.Text(); {
		case strings.HasSuffix(line, "KEYUPDATE"): // behind what the server said
			n++
			fallthrough
		case strings.HasPrefix(line, "Verify return code") && n == 0:
			if _, err := io.WriteString(in, "K\n"); err != nil {
				continue // it has ended
			}
		}
	}
	in.Close()
	out.Close()
	return n, all.String()
}

// ownFile has the test's X509-SVID and its key in PEM.
func (c *town) ownFile(t *testing.T) (path string) {
	t.Helper()
	held, err := workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr(c.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(held.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var text []byte
	for _, cert := range held.Certificates {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	path = filepath.Join(stage.Dir(t), "own.pem")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

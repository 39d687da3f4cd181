// What an agent with several addresses of its CA does when one of them is gone
// without a word, and when the CA is not what it was.

package integration_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
)

// twoDoors starts a CA that is reached by two IP addresses, in a network of the
// test's own, and an agent that knows both.
func twoDoors(t *testing.T) (d *stage.Domain, addresses []string) {
	t.Helper()
	dir := stage.Dir(t)
	grpc, https := stage.FreePort(t), stage.FreePort(t)
	for i := 1; i <= 2; i++ {
		ip := fmt.Sprintf("10.88.0.%d", i)
		if out, err := exec.CommandContext(t.Context(), "ip", "addr", "add", ip+"/32", "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		addresses = append(addresses, fmt.Sprintf("%s:%d", ip, grpc))
	}
	d = &stage.Domain{TB: t, TrustDomain: "shop.test", Admin: filepath.Join(dir, "ca", "admin.sock")}
	d.SetDir(dir)
	config := filepath.Join(dir, "ca.yaml")
	text := fmt.Sprintf("trust_domain: %s\ndata_dir: %s\naddress: 0.0.0.0:%d\nhttps_address: 0.0.0.0:%d\nhealth_address: 127.0.0.1:%d\nadmin_socket: %s\n",
		d.TrustDomain, filepath.Join(dir, "ca-data"), grpc, https, stage.FreePort(t), d.Admin)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.CA = stage.Start(t, "merlon-ca", nil, "-config", config)
	stage.Eventually(t, "the CA answers", func() error { _, _, err := d.Try("agent", "list"); return err })
	token := d.Token()
	d.GRPC = "[" + strings.Join(addresses, ", ") + "]"
	d.HTTPS = fmt.Sprintf("https://127.0.0.1:%d", https)
	d.StartAgent(token.Token, token.RootHash)
	stage.Eventually(t, "the agent is connected", func() error {
		if followedAddress(d) == "" {
			return errors.New("its log does not say so")
		}
		return nil
	})
	return d, addresses
}

// connectedTo is the address that the agent's log names last.
var connectedTo = regexp.MustCompile(`msg="connected to the CA" address=(\S+)`)

func followedAddress(d *stage.Domain) string {
	found := connectedTo.FindAllStringSubmatch(d.Agent.Log(), -1)
	if len(found) == 0 {
		return ""
	}
	return found[len(found)-1][1]
}

// The address vanishes as a machine does that loses power: no packet comes
// back, and no refusal.
func TestAddressThatVanishesIsLeft(t *testing.T) {
	t.Parallel() // it waits more than it works
	if !stage.InNamespace(t) {
		return
	}
	d, addresses := twoDoors(t)
	d.Entry("/me", "--ttl", "10s")
	var before *x509svid.SVID
	stage.Eventually(t, "an SVID is served", func() (err error) {
		before, err = fetch(t, d)
		return err
	})
	stream := watchSVIDs(t, d)
	stream.expect(t, d.ID("/me"))
	gone := followedAddress(d)
	if gone != addresses[0] && gone != addresses[1] {
		t.Fatalf("the agent follows %q; want one of %v", gone, addresses)
	}
	ip, _, _ := strings.Cut(gone, ":")
	if out, err := exec.CommandContext(t.Context(), "ip", "addr", "del", ip+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	began := time.Now()
	// The change is on the dead path when it is made, and comes on the other.
	d.Entry("/second")
	stream.expect(t, d.ID("/second"))
	t.Logf("the change came %v after the address vanished", time.Since(began).Round(100*time.Millisecond))
	stage.Eventually(t, "the log names the other address", func() error {
		if now := followedAddress(d); now == gone || now == "" {
			return fmt.Errorf("the agent follows %q", now)
		}
		return nil
	})
	if _, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "db"}, workloadapi.WithAddr(d.WorkloadAPI)); err != nil {
		t.Errorf("a JWT-SVID over the other address: %v", err)
	}
	stage.Eventually(t, "the SVID is renewed", func() error {
		now, err := fetch(t, d)
		if err == nil && now.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) == 0 {
			err = errors.New("still the first one")
		}
		return err
	})
}

// What a CA that is killed, an agent that is restarted and a join token that
// is tried twice look like from outside.

package integration_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/unixsock"
)

func fetch(t *testing.T, d *stage.Domain) (*x509svid.SVID, error) {
	t.Helper()
	return workloadapi.FetchX509SVID(t.Context(), workloadapi.WithAddr(d.WorkloadAPI))
}

func TestKilledCAForgetsNothing(t *testing.T) {
	d := stage.Separate(t)
	d.Entry("/me", "--ttl", "1h")
	d.Merlon("policy", "push", "../examples/quickstart/policy")
	unused := d.Token()
	var before *x509svid.SVID
	stage.Eventually(t, "an SVID is served", func() (err error) {
		before, err = fetch(t, d)
		return err
	})
	stream := watchSVIDs(t, d)

	entries, agents := d.Merlon("entry", "list", "-o", "json"), agentIDs(t, d)
	d.CA.Kill()
	if got, err := fetch(t, d); err != nil || got.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0 {
		t.Errorf("while the CA was down a workload got %v, %v; want the SVID it had", got, err)
	}
	d.CA.Restart()
	stage.Eventually(t, "the CA answers again", func() error {
		_, _, err := d.Try("agent", "list")
		return err
	})
	if got := d.Merlon("entry", "list", "-o", "json"); got != entries {
		t.Errorf("entries after the kill = %s; want %s", got, entries)
	}
	if got := agentIDs(t, d); got != agents {
		t.Errorf("agents after the kill = %s; want %s", got, agents)
	}
	stage.Eventually(t, "the agent reconnects by itself", func() error {
		if !strings.Contains(d.Merlon("agent", "list", "-o", "json"), `"connected": true`) {
			return errors.New("not connected")
		}
		return nil
	})
	if err := attest(t, d, unused.Token); err != nil {
		t.Errorf("a token made before the kill: %v; want it to work once", err)
	}
	if err := attest(t, d, unused.Token); err == nil {
		t.Error("a token worked twice")
	}
	var pushed struct {
		Generation uint64 `json:"generation"`
	}
	if err := json.Unmarshal([]byte(d.Merlon("policy", "push", "../examples/quickstart/policy", "-o", "json")), &pushed); err != nil {
		t.Fatal(err)
	}
	if pushed.Generation != 2 {
		t.Errorf("generation after the kill = %d; want 2", pushed.Generation)
	}
	// The workload's stream never ended; a new entry arrives on it.
	d.Entry("/second")
	stream.expect(t, d.ID("/second"))
}

func agentIDs(t *testing.T, d *stage.Domain) string {
	t.Helper()
	var agents []struct {
		SPIFFEID string `json:"spiffe_id"`
	}
	if err := json.Unmarshal([]byte(d.Merlon("agent", "list", "-o", "json")), &agents); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(agents)
}

func TestRestartedAgentResumes(t *testing.T) {
	d := stage.Separate(t)
	d.Entry("/me")
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	agents := agentIDs(t, d)
	d.Agent.Kill()
	d.Agent.Restart() // with the same, spent, token
	stage.Eventually(t, "an SVID is served again", func() error { _, err := fetch(t, d); return err })
	if got := agentIDs(t, d); got != agents {
		t.Errorf("agents after the restart = %s; want %s", got, agents)
	}
}

// T6: a token works once, however many try it together.
func TestJoinTokenWorksOnceIn200(t *testing.T) {
	d := stage.Separate(t)
	token := d.Token("--agent", "contested").Token
	var wg sync.WaitGroup
	won := make(chan struct{}, 200)
	start := make(chan struct{})
	for range 200 {
		wg.Go(func() {
			<-start
			if attest(t, d, token) == nil {
				won <- struct{}{}
			}
		})
	}
	close(start)
	wg.Wait()
	if got := len(won); got != 1 {
		t.Errorf("%d of 200 attestations with one token succeeded; want 1", got)
	}
}

// attest speaks the node API with a token, as an agent without a pin would.
func attest(t *testing.T, d *stage.Domain, token string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	cc, err := grpc.NewClient(d.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})))
	if err != nil {
		return err
	}
	defer cc.Close()
	_, err = capb.NewNodeClient(cc).Attest(t.Context(), &capb.AttestRequest{
		Evidence: &capb.AttestRequest_JoinToken{JoinToken: token}, Csr: csr,
	})
	return err
}

// The token of an agent that pins another root stays unspent: nothing was
// sent.
func TestWrongRootHashSendsNoEvidence(t *testing.T) {
	d := stage.Separate(t)
	d.Agent.Stop()
	d2 := *d
	token := d.Token("--agent", "cautious")
	d2Dir := stage.Dir(t)
	d2.SetDir(d2Dir)
	d2.StartAgent(token.Token, strings.Repeat("ab", 32))
	stage.Eventually(t, "the agent refuses the CA", func() error {
		if !strings.Contains(d2.Agent.Log(), "root") {
			return errors.New("its log does not speak of the root")
		}
		return nil
	})
	time.Sleep(500 * time.Millisecond) // let it retry; it must go on refusing
	if strings.Contains(d.Merlon("agent", "list"), "cautious") {
		t.Error("an agent with the wrong root hash was attested")
	}
	if err := attest(t, d, token.Token); err != nil {
		t.Errorf("the token was spent: %v", err)
	}
}

// svidStream is an open FetchX509SVID stream.
type svidStream struct {
	got chan *workload.X509SVIDResponse
	err chan error
}

// watchSVIDs opens the stream without any client library.
func watchSVIDs(t *testing.T, d *stage.Domain) *svidStream {
	t.Helper()
	cc, err := grpc.NewClient(strings.Replace(d.WorkloadAPI, "unix://", "unix:", 1), grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	ctx := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s := &svidStream{got: make(chan *workload.X509SVIDResponse, 100), err: make(chan error, 1)}
	go func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				s.err <- err
				return
			}
			s.got <- resp
		}
	}()
	return s
}

// expect waits for a message that carries id.
func (s *svidStream) expect(t *testing.T, id string) {
	t.Helper()
	timeout := time.After(15 * time.Second)
	for {
		select {
		case resp := <-s.got:
			for _, svid := range resp.GetSvids() {
				if svid.GetSpiffeId() == id {
					return
				}
			}
		case err := <-s.err:
			t.Fatalf("the stream ended: %v", err)
		case <-timeout:
			t.Fatalf("%s did not come within 15 s", id)
		}
	}
}

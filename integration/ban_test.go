// A banned node, over real processes: what its workloads hold ends everywhere at
// once, and one that moves to a good node goes on at once.

package integration_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
	"merlon.dev/sdk/httpauth"
)

// secondNode starts another agent of d's CA.
func secondNode(t *testing.T, d *stage.Domain, name string) *stage.Domain {
	t.Helper()
	token := d.Token("--agent", name)
	node := *d
	node.SetDir(stage.Dir(t))
	node.StartAgent(token.Token, token.RootHash)
	return &node
}

// entryOn registers this process under an agent.
func entryOn(t *testing.T, d *stage.Domain, path, agentID string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d.Merlon("entry", "create", "--spiffe-id", d.ID(path), "--selector", "unix:path:"+exe, "--parent", agentID)
}

func TestBanCutsAWholeNodeAndItsWorkloadMovesAtOnce(t *testing.T) {
	d := stage.Separate(t)
	good := secondNode(t, d, "good")
	goodID := d.ID("/agent/good")
	entryOn(t, d, "/web", d.AgentID())
	entryOn(t, d, "/orders", goodID)
	dir := t.TempDir()
	grants := fmt.Sprintf("grants:\n  - id: any\n    from: [%s, %s]\n    to: [%s]\n    http: {}\n", d.ID("/web"), d.ID("/orders"), d.ID("/orders"))
	if err := os.WriteFile(filepath.Join(dir, "grants.yaml"), []byte(grants), 0o600); err != nil {
		t.Fatal(err)
	}
	d.Merlon("policy", "push", dir)

	orders := services.Open(t, good, sdk.WithStartupTimeout(30*time.Second))
	url := services.Serve(t, orders, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/feed" {
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}
	}))
	clientOf := func(id *sdk.Identity) *http.Client {
		transport := httpauth.Transport(id, sdk.Service("orders"))
		return &http.Client{Transport: transport}
	}
	open := func(c *http.Client) chan error {
		t.Helper()
		var body io.ReadCloser
		stage.Eventually(t, "the stream opens", func() error {
			resp, err := c.Get(url + "/feed")
			if err != nil {
				return err
			}
			if resp.StatusCode != http.StatusOK {
				resp.Body.Close()
				return errors.New(resp.Status)
			}
			body = resp.Body
			return nil
		})
		t.Cleanup(func() { body.Close() })
		ended := make(chan error, 1)
		go func() { _, err := io.Copy(io.Discard, body); ended <- err }()
		return ended
	}
	webs := clientOf(services.Open(t, d, sdk.WithStartupTimeout(30*time.Second)))
	cut, kept := open(webs), open(clientOf(orders))

	d.Merlon("agent", "ban", "--note", "broken into", d.AgentID())
	select {
	case err := <-cut:
		if err == nil {
			t.Error("the stream of the banned node's workload ended as if it were complete")
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the stream of the banned node's workload was not cut")
	}
	stage.Eventually(t, "what the banned node holds is refused", func() error {
		if got := services.Reason(webs, url+"/again"); !strings.Contains(got, "bad certificate") && got != "REVOKED" {
			return fmt.Errorf("it is answered %q", got)
		}
		return nil
	})
	select {
	case err := <-kept:
		t.Errorf("the stream of another node's workload was cut: %v", err)
	default:
	}
	stage.Eventually(t, "the log of the banned agent says why", func() error {
		if !strings.Contains(d.Agent.Log(), "the agent is banned") {
			return errors.New("it does not")
		}
		return nil
	})

	// The workload moves.
	entryOn(t, d, "/web", goodID)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	api, err := workloadapi.New(ctx, workloadapi.WithAddr(good.WorkloadAPI))
	if err != nil {
		t.Fatal(err)
	}
	defer api.Close()
	var moved *x509svid.SVID
	var all *workloadapi.X509Context
	stage.Eventually(t, "/web has an SVID on the good node", func() error {
		if all, err = api.FetchX509Context(ctx); err != nil {
			return err
		}
		for _, held := range all.SVIDs {
			if held.ID.Path() == "/web" {
				moved = held
				return nil
			}
		}
		return fmt.Errorf("%d others", len(all.SVIDs))
	})
	id := spiffeid.RequireFromString(d.ID("/orders"))
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: tlsconfig.MTLSClientConfig(moved, all.Bundles, tlsconfig.AuthorizeID(id))}}
	services.WantReason(t, "its new SVID counts although the ban holds", c, url+"/moved", "200 OK")
}
